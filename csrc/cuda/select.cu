// Launcher of select: one launch for up to kBudgets images.
#include "select.cuh"

namespace crop {
namespace {

template <int kThreads, int kItems, bool kResident>
int launch(const SelectParams& p, int64_t count, int64_t first, bool vectors, const Budgets& budgets, Stream stream) {
    return LAUNCH_DEPENDENT(count, kThreads, 0, stream, (select_kernel<kThreads, kItems, kResident>), p, first, vectors, budgets);
}

}  // namespace

extern "C" int launch_select(const SelectParams* params, Stream stream) {
    const SelectParams& p = *params;
    if (p.num_tokens > kMaxTokens) return fail("select: num_tokens must be below 2^31 - 2^16, got %lld", (long long)p.num_tokens);
    for (int64_t i = 0; i < p.num_images; ++i)
        if (p.budget[i] < 0 || p.budget[i] > p.num_tokens || p.budget[i] > p.width)
            return fail("select: num_keep[%lld] must be in [0, num_vision=%lld], got %lld", (long long)i,
                        (long long)p.num_tokens, (long long)p.budget[i]);
    if (p.width == 0) return 0;
    const bool vectors = p.num_tokens % 4 == 0 && aligned16(p.score) && aligned16(p.weight) && aligned16(p.priority);
    for (int64_t first = 0; first < p.num_images; first += kBudgets) {
        const int64_t count = p.num_images - first < kBudgets ? p.num_images - first : kBudgets;
        Budgets budgets = {};
        for (int64_t i = 0; i < count; ++i) budgets.keep[i] = static_cast<int>(p.budget[first + i]);
        int error = 0;
        if (p.num_tokens <= 1024) error = launch<256, 4, true>(p, count, first, vectors, budgets, stream);
        else if (p.num_tokens <= 4096) error = launch<1024, 4, true>(p, count, first, vectors, budgets, stream);
        else if (p.num_tokens <= 8192) error = launch<1024, 8, true>(p, count, first, vectors, budgets, stream);
        else if (p.num_tokens <= 16384) error = launch<1024, 16, true>(p, count, first, vectors, budgets, stream);
        else error = launch<1024, 8, false>(p, count, first, vectors, budgets, stream);
        if (error) return error;
    }
    return 0;
}

}  // namespace crop
