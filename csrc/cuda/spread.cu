// Launcher of spread: one launch of one block.
#include "spread.cuh"

namespace crop {
namespace {

template <int kItems>
int launch(const SpreadParams& p, Stream stream) {
    const int threads = static_cast<int>(ceil_div(p.num_tokens, 32 * kItems) * 32);
    const int64_t at_once = p.at_once < p.count ? p.at_once : p.count;
    return LAUNCH_DEPENDENT(1, threads, at_once * 4, stream, spread_kernel<kItems>, p);
}

}  // namespace

extern "C" int launch_spread(const SpreadParams* params, Stream stream) {
    const SpreadParams& p = *params;
    if (p.num_tokens > kSpreadTokens)
        return fail("spread: num_tokens must be at most %d on CUDA, got %lld", kSpreadTokens, (long long)p.num_tokens);
    if (p.count == 0) return 0;
    return p.num_tokens <= 4 * kSpreadThreads ? launch<4>(p, stream) : launch<8>(p, stream);
}

}  // namespace crop
