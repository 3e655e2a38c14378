// A libcuda.so.1 that launches nothing. It notes what cuLaunchKernelEx is given: the configuration,
// the function and the bytes of every parameter, whose sizes have to be told before.
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

std::map<void*, std::vector<size_t>> sizes_of;
std::string noted;
int refusals = 0;

template <typename T>
void note(const T& value) {
  noted.append(reinterpret_cast<const char*>(&value), sizeof value);
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return 0; }
// NVRTC asks for a table, of whatever libcuda.so.1 the process has loaded.
int cuGetExportTable(const void** table, const void*) { return *table = nullptr, 500; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuCtxGetCurrent(void** context) { return *context = &sizes_of, 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuCtxGetLimit(size_t* value, int) { return *value = 0, 0; }
int cuCtxSetLimit(int, size_t) { return 0; }
int cuDeviceGet(int* device, int number) { return *device = number, 0; }
int cuDeviceGetAttribute(int* value, int, int) { return *value = 1, 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &sizes_of, 0; }
int cuModuleLoadData(void** module, const void*) { return *module = &sizes_of, 0; }
int cuModuleGetFunction(void** function, void*, const char* name) {
  if (!std::strcmp(name, "missing")) return 500;
  return *function = &sizes_of, 0;
}
int cuFuncGetAttribute(int* value, int, void*) { return *value = 0, 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuFuncSetCacheConfig(void*, int) { return 0; }
int cuGetErrorString(int, const char** text) { return *text = "refused", 0; }
int cuPointerGetAttribute(uint64_t* value, int, uint64_t pointer) { return *value = pointer, 0; }
int cuOccupancyMaxActiveClusters(int* count, void*, const void*) { return *count = 1, 0; }

int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address, const uint64_t* dims,
                           const uint64_t* strides, const unsigned* box, const unsigned*, int,
                           int swizzle, int, int fill) {
  uint64_t words[16] = {static_cast<uint64_t>(type), rank, reinterpret_cast<uint64_t>(address),
                        static_cast<uint64_t>(swizzle), static_cast<uint64_t>(fill)};
  for (unsigned i = 0; i < rank && i < 3; ++i) {
    words[5 + i] = dims[i];
    words[8 + i] = i + 1 < rank ? strides[i] : 0;
    words[11 + i] = box[i];
  }
  std::memcpy(map, words, sizeof words);
  return 0;
}

int cuLaunchKernelEx(const Config* config, void* function, void** params, void**) {
  if (refusals > 0) return --refusals, 1;
  for (const unsigned part : config->grid) note(part);
  for (const unsigned part : config->block) note(part);
  note(config->shared);
  note(config->stream);
  note(config->attribute_count);
  note(function);
  const auto& sizes = sizes_of.at(function);
  for (size_t i = 0; i < sizes.size(); ++i)
    noted.append(static_cast<const char*>(params[i]), sizes[i]);
  return 0;
}

// Tell the sizes of a function's parameters.
void fake_sizes(void* function, const size_t* sizes, size_t count) {
  sizes_of[function].assign(sizes, sizes + count);
}
// Refuse the next launches.
void fake_refuse(int count) { refusals = count; }
// Give what has been noted since the last call.
size_t fake_noted(char* out, size_t room) {
  const size_t size = noted.size();
  if (size > room) return size;
  std::memcpy(out, noted.data(), size);
  noted.clear();
  return size;
}

}  // extern "C"
