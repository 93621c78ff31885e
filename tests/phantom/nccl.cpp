// libnccl: collectives of the processes of one machine. Small messages are exchanged through shared memory, so that
// what processes tell each other is real; of large ones, only the waiting for each other.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "card.h"

using namespace phantom;

constexpr int MOST_RANKS = 8;
constexpr size_t SLOT_BYTES = 65536;  // the largest message that is exchanged
constexpr int PATIENCE_SECONDS = 120;

struct UniqueId {
  char bytes[128];
};

// In memory that the processes of a communicator share; all zeros at first.
struct Meeting {
  std::atomic<int> arrived, rounds;
  char slots[MOST_RANKS][SLOT_BYTES];
};

struct Communicator {
  int ranks, rank;
  Meeting* meeting;  // null for a process alone
};

// --- meeting ---------------------------------------------------------------------------------------------------------

static void wait_for_all(Communicator* c) {
  const int round = c->meeting->rounds;
  if (++c->meeting->arrived == c->ranks) {
    c->meeting->arrived = 0;
    c->meeting->rounds++;
    return;
  }
  for (long slept = 0; c->meeting->rounds == round; slept += 100) {
    if (slept > PATIENCE_SECONDS * 1000000L) {
      fprintf(stderr, "phantom: the other processes did not come within %d seconds\n", PATIENCE_SECONDS);
      abort();
    }
    usleep(100);
  }
}

static int join(Communicator** out, int ranks, const UniqueId& id, int rank) {
  if (ranks > MOST_RANKS) return 4;  // invalid argument
  auto* c = new Communicator{ranks, rank, nullptr};
  *out = c;
  if (ranks == 1) return 0;
  char name[64] = "/phantom-nccl-";
  for (int i = 0; i < 16; i++) snprintf(name + strlen(name), 3, "%02x", (unsigned char)id.bytes[i]);
  const int file = shm_open(name, O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, sizeof(Meeting))) return 2;  // system error
  void* shared = mmap(nullptr, sizeof(Meeting), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (shared == MAP_FAILED) return 2;
  c->meeting = (Meeting*)shared;
  wait_for_all(c);
  if (rank == 0) shm_unlink(name);  // everybody has it mapped
  return 0;
}

PHANTOM int ncclGetUniqueId(UniqueId* id) { return getrandom(id, sizeof *id, 0) == sizeof *id ? 0 : 2; }
PHANTOM int ncclCommInitRank(Communicator** out, int ranks, UniqueId id, int rank) {
  return join(out, ranks, id, rank);
}
PHANTOM int ncclCommInitRankConfig(Communicator** out, int ranks, UniqueId id, int rank, void*) {
  return join(out, ranks, id, rank);
}
PHANTOM int ncclCommInitRankScalable(Communicator** out, int ranks, int rank, int, UniqueId* ids, void*) {
  return join(out, ranks, *ids, rank);
}
// All ranks alike: nobody here splits a communicator into smaller ones.
PHANTOM int ncclCommSplit(Communicator* c, int, int, Communicator** out, void*) {
  *out = new Communicator(*c);
  return 0;
}
PHANTOM int ncclCommCount(Communicator* c, int* ranks) {
  *ranks = c->ranks;
  return 0;
}
PHANTOM int ncclCommUserRank(Communicator* c, int* rank) {
  *rank = c->rank;
  return 0;
}
PHANTOM int ncclCommCuDevice(Communicator*, int* card) {
  *card = current_card();
  return 0;
}
PHANTOM int ncclCommGetAsyncError(void*, int* error) {
  *error = 0;
  return 0;
}

// --- collectives -----------------------------------------------------------------------------------------------------

enum { INT8 = 0, UINT8 = 1, INT32 = 2, INT64 = 4, FLOAT32 = 7, FLOAT64 = 8 };
enum { SUM = 0, PRODUCT = 1, MAXIMUM = 2, MINIMUM = 3, AVERAGE = 4 };
static const size_t ELEMENT_BYTES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

// Everybody's message of this round, by rank, until `leave`; false where messages are too large to be exchanged.
static bool exchange(Communicator* c, const void* mine, size_t nbytes) {
  const bool is_small = nbytes <= SLOT_BYTES;
  if (is_small) memcpy(c->meeting->slots[c->rank], mine, nbytes);
  wait_for_all(c);
  return is_small;
}
static void leave(Communicator* c) { wait_for_all(c); }

template <class T>
static void reduce(Communicator* c, T* out, size_t count, int operation) {
  for (size_t i = 0; i < count; i++) {
    T value = ((T*)c->meeting->slots[0])[i];
    for (int rank = 1; rank < c->ranks; rank++) {
      const T other = ((T*)c->meeting->slots[rank])[i];
      if (operation == PRODUCT) value *= other;
      else if (operation == MAXIMUM) value = std::max(value, other);
      else if (operation == MINIMUM) value = std::min(value, other);
      else value += other;
    }
    out[i] = operation == AVERAGE ? T(value / c->ranks) : value;
  }
}

static int keep_own(const void* from, void* to, size_t nbytes) {
  if (from != to) copy(to, from, nbytes);
  return 0;
}

PHANTOM int ncclAllReduce(
    const void* from, void* to, size_t count, int kind, int operation, Communicator* c, void*) {
  const size_t nbytes = count * ELEMENT_BYTES[kind];
  if (c->ranks == 1) return keep_own(from, to, nbytes);
  if (exchange(c, from, nbytes)) {
    switch (kind) {
      case INT8: reduce(c, (int8_t*)to, count, operation); break;
      case UINT8: reduce(c, (uint8_t*)to, count, operation); break;
      case INT32: reduce(c, (int32_t*)to, count, operation); break;
      case INT64: reduce(c, (int64_t*)to, count, operation); break;
      case FLOAT32: reduce(c, (float*)to, count, operation); break;
      case FLOAT64: reduce(c, (double*)to, count, operation); break;
      default: keep_own(from, to, nbytes);
    }
  }
  leave(c);
  return 0;
}
PHANTOM int ncclReduce(
    const void* from, void* to, size_t count, int kind, int operation, int, Communicator* c, void* stream) {
  return ncclAllReduce(from, to, count, kind, operation, c, stream);
}
PHANTOM int ncclBroadcast(const void* from, void* to, size_t count, int kind, int root, Communicator* c, void*) {
  const size_t nbytes = count * ELEMENT_BYTES[kind];
  if (c->ranks == 1) return keep_own(from, to, nbytes);
  if (exchange(c, from, nbytes)) copy(to, c->meeting->slots[root], nbytes);
  leave(c);
  return 0;
}
PHANTOM int ncclBcast(void* buffer, size_t count, int kind, int root, Communicator* c, void* stream) {
  return ncclBroadcast(buffer, buffer, count, kind, root, c, stream);
}
PHANTOM int ncclAllGather(const void* from, void* to, size_t count, int kind, Communicator* c, void*) {
  const size_t nbytes = count * ELEMENT_BYTES[kind];
  if (c->ranks == 1) return keep_own(from, to, nbytes);
  if (exchange(c, from, nbytes))
    for (int rank = 0; rank < c->ranks; rank++) copy((char*)to + rank * nbytes, c->meeting->slots[rank], nbytes);
  leave(c);
  return 0;
}
// Each process keeps its own piece of what it brought.
PHANTOM int ncclReduceScatter(const void* from, void* to, size_t count, int kind, int, Communicator* c, void*) {
  const size_t nbytes = count * ELEMENT_BYTES[kind];
  if (c->ranks > 1) wait_for_all(c);
  return keep_own((const char*)from + c->rank * nbytes, to, nbytes);
}

// --- the rest --------------------------------------------------------------------------------------------------------

PHANTOM int ncclGetVersion(int* version) {
  *version = 22602;
  return 0;
}
PHANTOM const char* ncclGetErrorString(int) { return "a result of the phantom card"; }
PHANTOM const char* ncclGetLastError(void*) { return ""; }
PHANTOM int ncclCommRegister(void*, void*, size_t, void** handle) {
  *handle = new_handle();
  return 0;
}
PHANTOM int ncclMemAlloc(void** address, size_t nbytes) {
  *address = allocate(current_card(), nbytes);
  return *address ? 0 : 1;
}
PHANTOM int ncclMemFree(void* address) { return release(address) ? 0 : 4; }
