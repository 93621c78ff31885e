// libnvidia-ml: the cards of the machine, whatever CUDA_VISIBLE_DEVICES shows, and who uses them: this process, and
// the bytes of --others, which are nobody's. With --nvml 0 there is no driver to ask.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "card.h"

using namespace phantom;

enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, DRIVER_NOT_LOADED = 9 };
using Device = void*;  // 1 + the card's number on the machine

static int number_of(Device device) { return int((uintptr_t)device) - 1; }

// The card's number in CUDA; -1 where CUDA_VISIBLE_DEVICES hides it.
static int cuda_card(Device device) {
  for (int card = 0; card < visible_cards(); card++)
    if (physical_index(card) == number_of(device)) return card;
  return -1;
}

static std::string uuid_text(int physical) {
  unsigned char bytes[16];
  uuid_of(physical, bytes);
  std::string out = "GPU-";
  for (int i = 0; i < 16; i++) {
    char pair[3];
    snprintf(pair, sizeof pair, "%02x", bytes[i]);
    out += (i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "") + std::string(pair);
  }
  return out;
}

static int write_text(char* out, unsigned room, const char* text) {
  snprintf(out, room, "%s", text);
  return OK;
}

// --- the library -----------------------------------------------------------------------------------------------------

PHANTOM int nvmlInit_v2() { return config().has_nvml ? OK : DRIVER_NOT_LOADED; }
PHANTOM int nvmlInitWithFlags(unsigned) { return nvmlInit_v2(); }
PHANTOM int nvmlInit() { return nvmlInit_v2(); }
PHANTOM int nvmlShutdown() { return OK; }
PHANTOM const char* nvmlErrorString(int error) {
  return error == DRIVER_NOT_LOADED ? "Driver Not Loaded" : "an error of the phantom card";
}
PHANTOM int nvmlSystemGetDriverVersion(char* out, unsigned room) { return write_text(out, room, "560.35.03"); }
PHANTOM int nvmlSystemGetNVMLVersion(char* out, unsigned room) { return write_text(out, room, "12.560.35.03"); }
PHANTOM int nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = 12060;
  return OK;
}

// --- cards -----------------------------------------------------------------------------------------------------------

PHANTOM int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = config().cards;
  return OK;
}
PHANTOM int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device* device) {
  if (int(index) >= config().cards) return INVALID_ARGUMENT;
  *device = (Device)(uintptr_t)(index + 1);
  return OK;
}
PHANTOM int nvmlDeviceGetHandleByUUID(const char* uuid, Device* device) {
  for (int i = 0; i < config().cards; i++)
    if (uuid_text(i) == uuid) return nvmlDeviceGetHandleByIndex_v2(i, device);
  return NOT_FOUND;
}
PHANTOM int nvmlDeviceGetHandleByPciBusId_v2(const char* id, Device* device) {
  unsigned domain, bus = 0;
  sscanf(id, "%x:%x", &domain, &bus);
  return bus ? nvmlDeviceGetHandleByIndex_v2(bus - 1, device) : INVALID_ARGUMENT;
}
PHANTOM int nvmlDeviceGetName(Device, char* out, unsigned room) { return write_text(out, room, config().name); }
PHANTOM int nvmlDeviceGetUUID(Device device, char* out, unsigned room) {
  return write_text(out, room, uuid_text(number_of(device)).c_str());
}
PHANTOM int nvmlDeviceGetIndex(Device device, unsigned* index) {
  *index = number_of(device);
  return OK;
}
PHANTOM int nvmlDeviceGetCudaComputeCapability(Device, int* major, int* minor) {
  *major = config().major;
  *minor = config().minor;
  return OK;
}

// --- use -------------------------------------------------------------------------------------------------------------

static size_t used_by_us(Device device) {
  const int card = cuda_card(device);
  return card < 0 ? 0 : used_by_process(card);
}

struct Memory {
  unsigned long long total, free, used;
};
PHANTOM int nvmlDeviceGetMemoryInfo(Device device, Memory* out) {
  const size_t total = config().total_bytes, used = used_by_us(device) + config().others_bytes;
  *out = {total, total - used, used};
  return OK;
}
struct Memory2 {
  unsigned version;
  unsigned long long total, reserved, free, used;
};
PHANTOM int nvmlDeviceGetMemoryInfo_v2(Device device, Memory2* out) {
  Memory plain;
  nvmlDeviceGetMemoryInfo(device, &plain);
  *out = {out->version, plain.total, 0, plain.free, plain.used};
  return OK;
}

struct Process1 {
  unsigned pid;
  unsigned long long used;
};
struct Process3 {
  unsigned pid;
  unsigned long long used;
  unsigned gpu_instance, compute_instance;
};
template <class Process>
static int list_processes(Device device, unsigned* count, Process* out) {
  const int card = cuda_card(device);
  const unsigned room = *count;
  *count = card >= 0 && has_context(card);
  if (*count > room) return TOO_SMALL;
  if (*count) {
    memset(out, 0, sizeof *out);
    out->pid = getpid();
    out->used = used_by_us(device);
  }
  return OK;
}
PHANTOM int nvmlDeviceGetComputeRunningProcesses(Device d, unsigned* count, Process1* out) {
  return list_processes(d, count, out);
}
PHANTOM int nvmlDeviceGetComputeRunningProcesses_v2(Device d, unsigned* count, Process3* out) {
  return list_processes(d, count, out);
}
PHANTOM int nvmlDeviceGetComputeRunningProcesses_v3(Device d, unsigned* count, Process3* out) {
  return list_processes(d, count, out);
}
PHANTOM int nvmlDeviceGetGraphicsRunningProcesses_v3(Device, unsigned* count, void*) {
  *count = 0;
  return OK;
}

struct Rates {
  unsigned gpu, memory;
};
PHANTOM int nvmlDeviceGetUtilizationRates(Device, Rates* rates) {
  *rates = {0, 0};
  return OK;
}
PHANTOM int nvmlDeviceGetTemperature(Device, int, unsigned* celsius) {
  *celsius = 40;
  return OK;
}
PHANTOM int nvmlDeviceGetNvLinkRemoteDeviceType(Device, unsigned, int*) { return NOT_SUPPORTED; }
PHANTOM int nvmlDeviceGetNvLinkRemotePciInfo_v2(Device, unsigned, void*) { return NOT_SUPPORTED; }
