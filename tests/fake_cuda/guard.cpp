// CUDA where there is none: what libtorch_cpu asks of a device before it runs a kernel.
//
// Autograd's engine, c10's guards and pinning ask two interfaces, which a CUDA build of torch registers and a CPU build
// leaves empty: the device guard (devices, streams, events) and the hooks (is it there, what is pinned). Here both keep
// account of devices and streams per thread, as CUDA does, and of pinned memory. Nothing runs: a stream has no work in
// it, so an event is always done, and that the order between streams is right remains unproved.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>

namespace fake {

constexpr c10::DeviceIndex N_DEVICES = 8;
constexpr auto CUDA = c10::DeviceType::CUDA;

// Called where a host would wait for the device, with what it called.
std::atomic<void (*)(const char*)> on_wait{nullptr};

void wait_of(const char* what) {
  if (auto told = on_wait.load()) told(what);
}

thread_local c10::DeviceIndex current_device = 0;
thread_local std::array<c10::StreamId, N_DEVICES> current_streams{};
std::atomic<c10::StreamId> last_stream{0};

c10::DeviceIndex index_of(c10::Device device) {
  return device.has_index() ? device.index() : current_device;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  c10::Device getDevice() const override { return {CUDA, current_device}; }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(index_of(device) < N_DEVICES, "there is no ", device);
    uncheckedSetDevice(device);
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return N_DEVICES; }

  c10::Stream getStream(c10::Device device) const override {
    auto index = index_of(device);
    return c10::Stream(c10::Stream::UNSAFE, {CUDA, index}, current_streams[index]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, {CUDA, index_of(device)});
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, {CUDA, index_of(device)}, ++last_stream);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return reinterpret_cast<void*>(stream.id()); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { wait_of("Stream.synchronize"); }

  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);  // events have no state: any address serves
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { wait_of("Event.synchronize"); }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 1.0; }
  void synchronizeDevice(const c10::DeviceIndex) const override { wait_of("cuda.synchronize"); }
};

// Start and size of each piece of pinned memory.
std::map<std::uintptr_t, std::size_t> pinned;
std::mutex pinned_mutex;

void pin(void* start, std::size_t size) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  pinned[reinterpret_cast<std::uintptr_t>(start)] = size;
}

bool unpin(void* start) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  return pinned.erase(reinterpret_cast<std::uintptr_t>(start)) == 1;
}

bool is_pinned(const void* pointer) {
  auto at = reinterpret_cast<std::uintptr_t>(pointer);
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto after = pinned.upper_bound(at);
  if (after == pinned.begin()) return false;
  auto [start, size] = *--after;
  return at < start + size;
}

struct PinnedAllocator final : c10::Allocator {
  static void release(void* start) {
    unpin(start);
    std::free(start);
  }
  c10::DataPtr allocate(std::size_t size) override {
    if (size == 0) return {nullptr, nullptr, &release, c10::DeviceType::CPU};
    void* start = nullptr;
    TORCH_CHECK(posix_memalign(&start, 64, size) == 0, "no memory");
    pin(start, size);
    return {start, start, &release, c10::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t size) const override { default_copy_data(to, from, size); }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return N_DEVICES; }
  c10::DeviceIndex deviceCount() const override { return N_DEVICES; }
  c10::DeviceIndex current_device() const override { return fake::current_device; }
  c10::DeviceIndex getCurrentDevice() const override { return fake::current_device; }
  void setCurrentDevice(c10::DeviceIndex index) const override { Guard().setDevice({CUDA, index}); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return Guard().exchangeDevice({CUDA, index}).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  void deviceSynchronize(c10::DeviceIndex) const override { wait_of("cuda.synchronize"); }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
};

}  // namespace fake

namespace at {
// Preferred: a CUDA build of torch has hooks of its own, which want a driver.
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, fake::Hooks)
}  // namespace at

extern "C" {
// Called after torch is imported, as the guard of a CUDA build takes the same place when that is loaded.
void fake_cuda_install(void (*on_wait)(const char*)) {
  static fake::Guard guard;
  fake::on_wait = on_wait;
  c10::impl::DeviceGuardImplRegistrar registered(fake::CUDA, &guard);
}
void fake_cuda_pin(void* start, std::size_t size) { fake::pin(start, size); }
bool fake_cuda_unpin(void* start) { return fake::unpin(start); }
}
