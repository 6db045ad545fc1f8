// What the emulated warp operations compute, once all lanes of a mask have come.
#include <cstring>

#include "runtime.h"

namespace simt {
namespace {

void multiply(Thread* const* lanes) {
    float a[16][16], b[16][8];
    const auto of = [&](int lane) { return static_cast<const Product*>(lanes[lane]->call->operands); };
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const Product& p = *of(lane);
        for (int e = 0; e < 2; ++e) {
            for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][2 * t + e + i / 2 * 8] = p.value(p.a[i], e);
            for (int i = 0; i < 2; ++i) b[2 * t + e + i * 8][g] = p.value(p.b[i], e);
        }
    }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            float& d = of(lane)->d[i];
            for (int k = 0; k < 16; ++k) d += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
        }
}

void load_matrices(Thread* const* lanes) {
    Position* const caller = here;
    for (int m = 0; m < lanes[0]->call->argument; ++m)
        for (int row = 0; row < 8; ++row) {
            Thread& owner = *lanes[m * 8 + row];
            const char* from = static_cast<const char*>(static_cast<const Matrices*>(owner.call->operands)->row);
            here = &owner;
            if (reinterpret_cast<uintptr_t>(from) % 16) report("misaligned: row of ldmatrix", Site::of(owner.call->at));
            if (!is_shared(from)) report("bounds: row of ldmatrix is not in shared memory", Site::of(owner.call->at));
            touch(from, 16, Access::kRead, Site::of(owner.call->at));
            for (int t = 0; t < 4; ++t)
                std::memcpy(static_cast<const Matrices*>(lanes[row * 4 + t]->call->operands)->r + m, from + 4 * t, 4);
        }
    here = caller;
}

}  // namespace

void execute(Block& block, unsigned first, unsigned mask) {
    Thread* const* lanes = block.threads + first;
    const Op op = lanes[std::countr_zero(mask)]->call->op;
    uint64_t all = op == Op::kAnd ? ~0ull : 0, ballot = 0;
    int64_t low = INT64_MAX, high = INT64_MIN;
    bool equal = true;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const uint64_t value = lanes[lane]->call->value;
        if (op == Op::kAdd) all += value;
        if (op == Op::kAnd) all &= value;
        if (op == Op::kOr) all |= value;
        if (op == Op::kExclusiveOr) all ^= value;
        low = std::min(low, static_cast<int64_t>(value)), high = std::max(high, static_cast<int64_t>(value));
        if (value) ballot |= 1u << lane;
        equal = equal && value == lanes[std::countr_zero(mask)]->call->value;
    }
    if (op == Op::kMultiply || op == Op::kMatrix) {
        if (mask != ~0u) return report("warp-mask: mma and ldmatrix need all 32 lanes", Site::of(lanes[std::countr_zero(mask)]->call->at));
        if (op == Op::kMultiply) multiply(lanes);
        else load_matrices(lanes);
    }
    if (op == Op::kSync) join(block.warps[first / 32], lanes, mask);
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        Call& call = *lanes[lane]->call;
        const unsigned width = static_cast<unsigned>(call.width), segment = lane & ~(width - 1);
        const unsigned by = static_cast<unsigned>(call.argument);
        unsigned source = lane;
        switch (op) {
            case Op::kIndex: source = segment | (by & (width - 1)); break;
            case Op::kUp: source = lane < segment + by ? lane : lane - by; break;
            case Op::kDown: source = lane + by >= segment + width ? lane : lane + by; break;
            case Op::kXor: source = (lane ^ by) >= segment + width ? lane : lane ^ by; break;
            case Op::kBallot: call.result = ballot; continue;
            case Op::kAny: call.result = ballot != 0; continue;
            case Op::kAll: call.result = ballot == mask; continue;
            case Op::kMatchAll: call.result = equal ? mask : 0; continue;
            case Op::kMatchAny:
                call.result = 0;
                for (unsigned other = 0; other < 32; ++other)
                    if (mask >> other & 1 && lanes[other]->call->value == call.value) call.result |= 1u << other;
                continue;
            case Op::kMin: call.result = static_cast<uint64_t>(low); continue;
            case Op::kMax: call.result = static_cast<uint64_t>(high); continue;
            default: call.result = all; continue;
        }
        call.result = mask >> source & 1 ? lanes[source]->call->value : ~0ull;  // nobody's value is poison
    }
}

}  // namespace simt
