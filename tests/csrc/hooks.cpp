// Race build: what the compiler calls at every access to memory (-fsanitize=thread), in the place of ThreadSanitizer.
#include <cstring>

#include "runtime.h"

#if defined(SIMT_RACE)
#define COUNTER ::simt::Site::of(__builtin_return_address(0))
#define HOOK(n)                                                                                                          \
    void __tsan_read##n(void* at) { simt::touch(at, n, simt::Access::kRead, COUNTER); }                                  \
    void __tsan_write##n(void* at) { simt::touch(at, n, simt::Access::kWrite, COUNTER); }                                \
    void __tsan_unaligned_read##n(void* at) { simt::touch(at, n, simt::Access::kRead, COUNTER); }                        \
    void __tsan_unaligned_write##n(void* at) { simt::touch(at, n, simt::Access::kWrite, COUNTER); }                      \
    void __tsan_volatile_read##n(void* at) { simt::touch(at, n, simt::Access::kAtomic, COUNTER); }                       \
    void __tsan_volatile_write##n(void* at) { simt::touch(at, n, simt::Access::kAtomic, COUNTER); }
extern "C" {
HOOK(1)
HOOK(2)
HOOK(4)
HOOK(8)
HOOK(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_read_range(void* at, unsigned long n) { simt::touch(at, n, simt::Access::kRead, COUNTER); }
void __tsan_write_range(void* at, unsigned long n) { simt::touch(at, n, simt::Access::kWrite, COUNTER); }
void* __tsan_memset(void* to, int value, unsigned long n) {
    simt::touch(to, n, simt::Access::kWrite, COUNTER);
    return std::memset(to, value, n);
}
void* __tsan_memcpy(void* to, const void* from, unsigned long n) {
    simt::touch(from, n, simt::Access::kRead, COUNTER), simt::touch(to, n, simt::Access::kWrite, COUNTER);
    return std::memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, unsigned long n) {
    simt::touch(from, n, simt::Access::kRead, COUNTER), simt::touch(to, n, simt::Access::kWrite, COUNTER);
    return std::memmove(to, from, n);
}
}
#endif
