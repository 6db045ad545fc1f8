// Chooses at run time among the builds of the CPU kernels: the best instruction set that was compiled and the CPU has.
#include "dispatch.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "ops.h"

namespace crop {

#define CROP_DECLARE(isa)                                                    \
    namespace isa {                                                          \
    int attention_mass(const AttentionMassParams&, int threads);             \
    size_t attention_mass_scratch(const AttentionMassParams&);               \
    int select(const SelectParams&, int threads);                            \
    int pack(const PackParams&, int threads);                                \
    int compact(const CompactParams&, int threads);                          \
    int invert_index(const InverseParams&, int threads);                     \
    int spread(const SpreadParams&, int threads);                            \
    int saliency(const SaliencyParams&, int threads);                        \
    int adaptive_pool(const PoolParams&, int threads);                       \
    int adaptive_pool_backward(const PoolBackwardParams&, int threads);      \
    }
#define CROP_KERNELS(isa)                                                                                        \
    {#isa, isa::attention_mass, isa::attention_mass_scratch, isa::select, isa::pack, isa::compact,               \
     isa::invert_index, isa::spread, isa::saliency, isa::adaptive_pool, isa::adaptive_pool_backward}

CROP_DECLARE(baseline)
#if defined(__x86_64__)
CROP_DECLARE(avx2)
CROP_DECLARE(avx512)
#endif

namespace {

struct Kernels {
    const char* name;
    int (*attention_mass)(const AttentionMassParams&, int);
    size_t (*attention_mass_scratch)(const AttentionMassParams&);
    int (*select)(const SelectParams&, int);
    int (*pack)(const PackParams&, int);
    int (*compact)(const CompactParams&, int);
    int (*invert_index)(const InverseParams&, int);
    int (*spread)(const SpreadParams&, int);
    int (*saliency)(const SaliencyParams&, int);
    int (*adaptive_pool)(const PoolParams&, int);
    int (*adaptive_pool_backward)(const PoolBackwardParams&, int);
};

constexpr Kernels kBuilds[] = {
    CROP_KERNELS(baseline),
#if defined(__x86_64__)
    CROP_KERNELS(avx2),
    CROP_KERNELS(avx512),
#endif
};
constexpr int kNumBuilds = sizeof(kBuilds) / sizeof(kBuilds[0]);

bool supported(int build) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    // Every CPU with AVX2 and FMA also has F16C.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (build == 1) return avx2;
    if (build == 2)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return build == 0;
}

const Kernels* best() {
    int build = kNumBuilds - 1;
    while (!supported(build)) --build;
    return &kBuilds[build];
}

const Kernels* active = best();

thread_local char message[512] = "";

}  // namespace

const char* last_error() { return message; }

int fail(const char* format, ...) {
    va_list args;
    va_start(args, format);
    std::vsnprintf(message, sizeof(message), format, args);
    va_end(args);
    return kBadArgument;
}

int num_builds() { return kNumBuilds; }
const char* build_name(int build) { return kBuilds[build].name; }
const char* active_isa() { return active->name; }

int set_isa(const char* name) {
    for (int build = 0; build < kNumBuilds; ++build)
        if (std::strcmp(name, kBuilds[build].name) == 0) {
            if (!supported(build)) return fail("set_isa: name must be an instruction set of this CPU, got %s", name);
            active = &kBuilds[build];
            return 0;
        }
    return fail("set_isa: name must be a compiled instruction set, got %s", name);
}

int launch_attention_mass_cpu(const AttentionMassParams& p, int threads) { return active->attention_mass(p, threads); }
int launch_select_cpu(const SelectParams& p, int threads) { return active->select(p, threads); }
int launch_pack_cpu(const PackParams& p, int threads) { return active->pack(p, threads); }
int launch_compact_cpu(const CompactParams& p, int threads) { return active->compact(p, threads); }
int launch_invert_index_cpu(const InverseParams& p, int threads) { return active->invert_index(p, threads); }
int launch_spread_cpu(const SpreadParams& p, int threads) { return active->spread(p, threads); }
int launch_saliency_cpu(const SaliencyParams& p, int threads) { return active->saliency(p, threads); }
int launch_adaptive_pool_cpu(const PoolParams& p, int threads) { return active->adaptive_pool(p, threads); }
int launch_adaptive_pool_backward_cpu(const PoolBackwardParams& p, int threads) {
    return active->adaptive_pool_backward(p, threads);
}
size_t attention_mass_scratch_cpu(const AttentionMassParams& p) { return active->attention_mass_scratch(p); }

}  // namespace crop
