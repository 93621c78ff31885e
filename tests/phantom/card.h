// The phantom cards as one process sees them: shared by all stand-in libraries through libphantomcard.so.
#pragma once
#include <cstddef>
#include <cstdint>

#define PHANTOM extern "C" __attribute__((visibility("default")))

namespace phantom {

constexpr size_t MIB = size_t(1) << 20;
constexpr size_t PAGE = 2 * MIB;  // the unit in which the driver hands out memory
constexpr int MOST_CARDS = 64;

// What phantom-run was told. All cards of a machine are alike.
struct Config {
  int cards;
  size_t total_bytes;       // of a card
  size_t context_bytes;     // taken by this process's context on a card
  size_t others_bytes;      // taken by other programs, on every card
  size_t workspace_bytes;   // what every convolution asks for
  size_t copy_limit_bytes;  // larger copies to the card are not carried out
  int major, minor;         // compute capability
  int multiprocessors;
  bool has_nvml, logs;
  char name[96];
};
const Config& config();

// --- cards: numbered as CUDA_VISIBLE_DEVICES shows them ---
int visible_cards();
int physical_index(int card);  // its number on the machine
void uuid_of(int physical, unsigned char out[16]);
int& current_card();  // of this thread

// --- memory ---
bool make_context(int card);  // true where this call made it
bool has_context(int card);
size_t used_by_process(int card);  // the context and what is allocated
size_t free_bytes(int card);
void* allocate(int card, size_t nbytes);  // null where the card is full
bool release(void* address);              // false: was not allocated
bool take(int card, size_t nbytes);       // physical memory without an address; false where the card is full
void give_back(int card, size_t nbytes);
void* reserve_addresses(int card, size_t nbytes);  // addresses without physical memory
int card_of(const void* address);                  // -1: not a card's
void pin(void* address, size_t nbytes);
size_t unpin(void* address);  // bytes; 0: was not pinned
bool is_pinned(const void* address);

// --- contents: carried out where the result is the host's, or small ---
void copy(void* to, const void* from, size_t nbytes);
void fill(void* to, int value, size_t nbytes);

void* new_handle();  // non-null, never the same twice

}  // namespace phantom
