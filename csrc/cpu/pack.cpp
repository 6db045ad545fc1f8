// pack on the CPU: a few thousand numbers, so one thread; from the right end, where the slots are known without a count.
#include "../common/simd.h"

namespace crop::CROP_ISA {
namespace {

// slot_of = 0 for what stays and -1 for what does not.
int mark(const PackParams& p) {
    for (int64_t n = 0; n < p.batch * p.num_tokens; ++n) p.slot_of[n] = p.stays[n] ? 0 : -1;
    for (int64_t i = 0; i < p.num_images; ++i) {
        const int64_t b = p.sample ? p.sample[i] : i;
        if (b < 0 || b >= p.batch)
            return fail("pack: sample must be at least 0 and less than %lld, got %lld", (long long)p.batch, (long long)b);
        for (int64_t k = 0; k < p.num_kept; ++k) {
            const int64_t n = p.kept[i * p.num_kept + k];
            if (n >= p.num_tokens)
                return fail("pack: kept must be less than %lld, got %lld", (long long)p.num_tokens, (long long)n);
            if (n >= 0) p.slot_of[b * p.num_tokens + n] = 0;
        }
    }
    return 0;
}

}  // namespace

int pack(const PackParams& p, int) {
    if (const int error = mark(p)) return error;
    for (int64_t b = 0; b < p.batch; ++b) {
        int64_t *slot_of = p.slot_of + b * p.num_tokens, *kept_index = p.kept_index + b * p.width;
        int64_t left = p.width;
        for (int64_t n = p.num_tokens - 1; n >= 0; --n) {
            if (slot_of[n] < 0) continue;
            slot_of[n] = --left;
            if (left >= 0) kept_index[left] = n;
        }
        if (left < 0)
            return fail("pack: width must be at least %lld, the tokens of a sample that stay, got %lld",
                        (long long)(p.width - left), (long long)p.width);
        while (left > 0) kept_index[--left] = -1;
    }
    return 0;
}

}  // namespace crop::CROP_ISA
