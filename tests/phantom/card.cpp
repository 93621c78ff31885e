// The cards: how they are configured, who holds how much of their memory, and what copies do.
#include "card.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#pragma GCC visibility push(default)
namespace phantom {

// --- configuration ---------------------------------------------------------------------------------------------------

static size_t number(const char* variable, size_t otherwise) {
  const char* text = getenv(variable);
  return text && *text ? strtoull(text, nullptr, 10) : otherwise;
}

const Config& config() {
  static const Config read = [] {
    Config c{};
    c.cards = int(std::min(number("PHANTOM_CARDS", 1), size_t(MOST_CARDS)));
    c.total_bytes = number("PHANTOM_TOTAL", 4233035776);  // a GTX 970, as cudaMemGetInfo tells it
    c.context_bytes = number("PHANTOM_CONTEXT", 100 * MIB);
    c.others_bytes = number("PHANTOM_OTHERS", 0);
    c.workspace_bytes = number("PHANTOM_WORKSPACE_MIB", 0) * MIB;
    c.copy_limit_bytes = number("PHANTOM_COPY_BYTES", 4096);
    c.multiprocessors = int(number("PHANTOM_SMS", 13));
    c.has_nvml = number("PHANTOM_NVML", 1);
    c.logs = number("PHANTOM_LOG", 0);
    c.major = 5;
    c.minor = 2;
    if (const char* capability = getenv("PHANTOM_CC")) sscanf(capability, "%d.%d", &c.major, &c.minor);
    const char* name = getenv("PHANTOM_NAME");
    snprintf(c.name, sizeof c.name, "%s", name && *name ? name : "NVIDIA GeForce GTX 970");
    return c;
  }();
  return read;
}

// CUDA_VISIBLE_DEVICES as a list of numbers; the first that is no card ends it, as in the driver.
static const std::vector<int>& visible() {
  static const std::vector<int> shown = [] {
    std::vector<int> out;
    const char* text = getenv("CUDA_VISIBLE_DEVICES");
    if (!text) {
      for (int i = 0; i < config().cards; i++) out.push_back(i);
      return out;
    }
    std::stringstream words(text);
    for (std::string word; std::getline(words, word, ',');) {
      char* end;
      long index = strtol(word.c_str(), &end, 10);
      if (end == word.c_str() || index < 0 || index >= config().cards) break;
      out.push_back(int(index));
    }
    return out;
  }();
  return shown;
}

int visible_cards() { return int(visible().size()); }
int physical_index(int card) { return visible().at(card); }

void uuid_of(int physical, unsigned char out[16]) {
  for (int i = 0; i < 16; i++) out[i] = (unsigned char)(0x50 + i);
  out[15] += (unsigned char)(16 * physical);
}

int& current_card() {
  static thread_local int card = 0;
  return card;
}

// --- memory ----------------------------------------------------------------------------------------------------------

struct Piece {
  size_t nbytes;
  int card;
};
using Pieces = std::map<uintptr_t, Piece>;

struct State {
  std::recursive_mutex lock;
  Pieces segments, ranges, pins;
  size_t allocated[MOST_CARDS] = {};
  std::atomic<bool> context[MOST_CARDS] = {};
};
// Never destroyed: torch still frees memory while a process ends.
static State& state() {
  static State* s = new State;
  return *s;
}
using Guard = std::lock_guard<std::recursive_mutex>;

bool make_context(int card) { return !state().context[card].exchange(true); }
bool has_context(int card) { return state().context[card]; }

size_t used_by_process(int card) {
  Guard guard(state().lock);
  return (has_context(card) ? config().context_bytes : 0) + state().allocated[card];
}

size_t free_bytes(int card) {
  size_t used = used_by_process(card) + config().others_bytes;
  return used < config().total_bytes ? config().total_bytes - used : 0;
}

bool take(int card, size_t nbytes) {
  make_context(card);
  Guard guard(state().lock);
  if (nbytes > free_bytes(card)) return false;
  state().allocated[card] += nbytes;
  return true;
}

void give_back(int card, size_t nbytes) {
  Guard guard(state().lock);
  state().allocated[card] -= nbytes;
}

// Host pages that stand for the card's, aligned as cudaMalloc's are; only those that are written take real memory.
static void* map_pages(size_t nbytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* mapped = mmap(nullptr, nbytes + PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* start = (char*)mapped;
  char* aligned = (char*)(((uintptr_t)start + PAGE - 1) / PAGE * PAGE);
  if (aligned > start) munmap(start, aligned - start);
  munmap(aligned + nbytes, start + PAGE - aligned);
  madvise(aligned, nbytes, MADV_NOHUGEPAGE);
  return aligned;
}

void* allocate(int card, size_t nbytes) {
  size_t rounded = std::max(PAGE, (nbytes + PAGE - 1) / PAGE * PAGE);
  Guard guard(state().lock);
  if (!take(card, rounded)) return nullptr;
  void* address = map_pages(rounded);
  if (!address) {
    give_back(card, rounded);
    return nullptr;
  }
  state().segments[(uintptr_t)address] = {rounded, card};
  return address;
}

bool release(void* address) {
  Guard guard(state().lock);
  auto found = state().segments.find((uintptr_t)address);
  if (found == state().segments.end()) return false;
  munmap(address, found->second.nbytes);
  give_back(found->second.card, found->second.nbytes);
  state().segments.erase(found);
  return true;
}

void* reserve_addresses(int card, size_t nbytes) {
  void* address = map_pages(nbytes);
  Guard guard(state().lock);
  if (address) state().ranges[(uintptr_t)address] = {nbytes, card};
  return address;
}

static const Piece* piece_with(const Pieces& pieces, const void* address) {
  auto after = pieces.upper_bound((uintptr_t)address);
  if (after == pieces.begin()) return nullptr;
  auto& [start, piece] = *std::prev(after);
  return (uintptr_t)address < start + piece.nbytes ? &piece : nullptr;
}

int card_of(const void* address) {
  Guard guard(state().lock);
  if (const Piece* piece = piece_with(state().segments, address)) return piece->card;
  if (const Piece* piece = piece_with(state().ranges, address)) return piece->card;
  return -1;
}

void pin(void* address, size_t nbytes) {
  Guard guard(state().lock);
  state().pins[(uintptr_t)address] = {nbytes, -1};
}

size_t unpin(void* address) {
  Guard guard(state().lock);
  auto found = state().pins.find((uintptr_t)address);
  if (found == state().pins.end()) return 0;
  size_t nbytes = found->second.nbytes;
  state().pins.erase(found);
  return nbytes;
}

bool is_pinned(const void* address) {
  Guard guard(state().lock);
  return piece_with(state().pins, address);
}

// --- contents --------------------------------------------------------------------------------------------------------

// Infinity or NaN as a single float: it would stay in the card's memory, and look like a result where no kernel writes.
static bool is_not_finite(const void* value, size_t nbytes) {
  uint32_t bits;
  if (nbytes != sizeof bits) return false;
  memcpy(&bits, value, nbytes);
  return (bits & 0x7fffffff) == 0x7f800000 || bits == 0x7fc00000;
}

void copy(void* to, const void* from, size_t nbytes) {
  const bool to_host = card_of(to) < 0;
  if (!nbytes || (!to_host && nbytes > config().copy_limit_bytes)) return;
  if (to_host || !is_not_finite(from, nbytes))
    memmove(to, from, nbytes);
  else
    memset(to, 0, nbytes);
}

void fill(void* to, int value, size_t nbytes) {
  const size_t limit = std::max(config().copy_limit_bytes, size_t(65536));
  if (nbytes && (nbytes <= limit || card_of(to) < 0)) memset(to, value, nbytes);
}

void* new_handle() {
  static std::atomic<uintptr_t> next{0x10000};
  return (void*)(next += 64);
}

}  // namespace phantom
#pragma GCC visibility pop
