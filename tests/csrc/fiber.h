// How a fiber gets its stack and gives way: for simt.cpp alone, which is the only file to include it.
#pragma once
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
constexpr size_t kStack = 256 * 1024;
#else
constexpr size_t kStack = 64 * 1024;
#define __sanitizer_start_switch_fiber(fake, bottom, size) (void)0
#define __sanitizer_finish_switch_fiber(fake, bottom, size) (void)0
#define __asan_unpoison_memory_region(memory, size) (void)0
#endif
constexpr size_t kGuard = 4096;

// simt_switch: saves the registers that a function must keep, stores the stack pointer and goes on where `to` was stored.
extern "C" void simt_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
    .text
    .type simt_switch, @function
simt_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
    .size simt_switch, . - simt_switch
)");
inline void* first_frame(char*, char* top, void (*entry)()) {
    void** frame = reinterpret_cast<void**>(top) - 8;  // six registers, the entry, an address nobody returns to
    std::memset(frame, 0, 8 * sizeof(void*));
    frame[6] = reinterpret_cast<void*>(entry);
    return frame;
}
#else
extern "C" inline void simt_switch(void** from, void* to) {
    ucontext_t mine;
    *from = &mine;
    swapcontext(&mine, static_cast<ucontext_t*>(to));
}
inline void* first_frame(char* bottom, char* top, void (*entry)()) {
    auto* context = reinterpret_cast<ucontext_t*>(top - (sizeof(ucontext_t) + 63) / 64 * 64);
    getcontext(context);
    context->uc_stack.ss_sp = bottom;
    context->uc_stack.ss_size = static_cast<size_t>(reinterpret_cast<char*>(context) - bottom);
    makecontext(context, entry, 0);
    return context;
}
#endif
