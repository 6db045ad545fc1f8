// The emulator's scheduler: threads are fibers on one OS thread, switched only at barriers, warp operations, atomics and
// exit, in an order that the policy decides, so that every run can be repeated.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <random>

#include "fiber.h"
#include "runtime.h"

namespace simt {

Position* here = nullptr;
Launch now;

namespace {

enum Policy { kForward, kReverse, kRandom };
int policy = kForward, residents = 1, largest = 8;  // blocks of a cluster
std::string gone_file;  // a barrier that lets everybody through
unsigned gone_line = 0;
bool gone(Where at) { return at.line() == gone_line && std::strstr(at.file_name(), gone_file.c_str()); }
std::minstd_rand dice;
unsigned roll(unsigned sides) { return static_cast<unsigned>(dice()) % sides; }

std::vector<Block> slots;     // the resident blocks
char* stacks = nullptr;
size_t num_stacks = 0;        // each has a guard page and so two mappings, of which a process may have some ten thousand
bool stale_stacks = false;    // a launch was aborted: frames were left behind
uint64_t progress = 0;        // counts everything but waiting
bool hopeless = false;        // the launch cannot go on
uint32_t next_serial = 1;

void* scheduler_pointer = nullptr;
[[maybe_unused]] const void* scheduler_bottom = nullptr;
[[maybe_unused]] size_t scheduler_size = 0;

unsigned pick(unsigned mask) {  // a set bit, as the policy likes it
    if (policy == kForward) return std::countr_zero(mask);
    if (policy == kReverse) return 31 - std::countl_zero(mask);
    const unsigned by = roll(32);
    return (std::countr_zero(std::rotr(mask, static_cast<int>(by))) + by) % 32;
}

std::string number(const char* format, unsigned value) {
    char buffer[96];
    std::snprintf(buffer, sizeof(buffer), format, value);
    return buffer;
}

// --- fibers -----------------------------------------------------------------------------------------------------------

void to_scheduler() {
    [[maybe_unused]] Thread& t = self();
    __sanitizer_start_switch_fiber(t.state == State::kDone ? nullptr : &t.fake_stack, scheduler_bottom, scheduler_size);
    simt_switch(&t.stack_pointer, scheduler_pointer);
    __sanitizer_finish_switch_fiber(t.fake_stack, &scheduler_bottom, &scheduler_size);
}

void resume(Thread& t) {
    [[maybe_unused]] void* fake = nullptr;
    here = &t;
    now.switches += 1;
    [[maybe_unused]] char* bottom = stacks + (reinterpret_cast<char*>(&t) - stacks) / kStack * kStack + kGuard;
    __sanitizer_start_switch_fiber(&fake, bottom, kStack - kGuard);
    simt_switch(&scheduler_pointer, t.stack_pointer);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
    here = nullptr;
}

void set_ready(Thread& t) {
    Block& block = *t.owner;
    t.state = State::kReady;
    block.warps[t.number / 32].ready |= 1u << t.lane();
    block.ready_warps |= 1u << t.number / 32;
}

void set_waiting(Thread& t, State state, Where at) {
    Block& block = *t.owner;
    Warp& warp = block.warps[t.number / 32];
    t.state = state, t.where = at, t.atomics = 0;
    warp.ready &= ~(1u << t.lane());
    if (!warp.ready) block.ready_warps &= ~(1u << t.number / 32);
}

void open_barrier(Block& block) {
    const int all = block.waiting, sum = block.sum;
    for (int i = 0; i < now.kernel->block; ++i) {
        Thread& t = *block.threads[i];
        if (t.state != State::kBarrier) continue;
        t.result = block.barrier_op == Op::kBarrierCount ? sum : block.barrier_op == Op::kBarrierOr ? sum > 0 : sum == all;
        set_ready(t);
    }
    block.epoch += 1, block.waiting = block.sum = 0, ++progress;
}

void open_cluster(const Cluster& cluster) {
    for (Block& block : cluster) {
        for (int i = 0; i < now.kernel->block; ++i)
            if (block.threads[i]->state == State::kCluster) set_ready(*block.threads[i]);
        block.at_cluster = 0, block.epoch += block.ordered;
    }
    if (cluster.first->ordered) join(cluster);
    ++progress;
}

void try_cluster(const Cluster& cluster) {  // opens if everybody who lives has come
    int waiting = 0, live = 0;
    for (Block& block : cluster) waiting += block.at_cluster, live += block.live;
    if (waiting && waiting == live) open_cluster(cluster);
}

// --- warp operations ---------------------------------------------------------------------------------------------------

// Runs the operation of `mask` if all its lanes have come.
void try_warp(Block& block, unsigned first, unsigned mask) {
    Warp& warp = block.warps[first / 32];
    if (mask == 0 || (warp.arrived & mask) != mask) return;
    Thread* const* lanes = block.threads + first;
    const Call& leader = *lanes[std::countr_zero(mask)]->call;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const Call& call = *lanes[lane]->call;
        if (call.mask != mask) return;  // waits for another group; if that never comes, the deadlock is reported
        const bool aligned = call.op == Op::kMultiply || call.op == Op::kMatrix;
        if (call.op != leader.op || (aligned && call.at.line() != leader.at.line())) {
            report("warp-operation: lanes of one mask are in different operations", Site::of(call.at), " and", Site::of(leader.at));
            hopeless = true;
            return;
        }
    }
    execute(block, first, mask);
    warp.arrived &= ~mask, ++progress;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) lanes[lane]->call = nullptr, set_ready(*lanes[lane]);
}

// --- blocks -----------------------------------------------------------------------------------------------------------

void leave() {
    Thread& t = self();
    Block& block = *t.owner;
    if (!t.copies.empty()) report("cp.async: a copy is on its way when the thread ends", Site::of(t.copies[0].at));
    set_waiting(t, State::kDone, {});
    Warp& warp = block.warps[t.number / 32];
    warp.exited |= 1u << t.lane();
    block.live -= 1, ++progress;
    if (block.waiting && block.waiting == block.live) open_barrier(block);
    try_cluster(cluster_of(block));
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(warp.arrived >> lane & 1)) continue;
        Call& call = *block.threads[t.number / 32 * 32 + lane]->call;
        if (!(call.mask >> t.lane() & 1)) continue;
        report("warp-mask: lane " + std::to_string(t.lane()) + " of the mask has ended before the operation", Site::of(call.at));
        call.mask &= ~(1u << t.lane());
        try_warp(block, t.number / 32 * 32, call.mask);
    }
}

void entry() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
    now.kernel->body();
    leave();
    to_scheduler();
}

void start(Block& block, int slot, uint64_t linear) {
    const Kernel& kernel = *now.kernel;
    const uint64_t x = kernel.grid.x, y = kernel.grid.y;
    block.index = {static_cast<unsigned>(linear % x), static_cast<unsigned>(linear / x % y), static_cast<unsigned>(linear / x / y)};
    block.serial = now.first_serial + static_cast<uint32_t>(linear);
    block.epoch = 0, block.live = kernel.block, block.waiting = block.sum = 0, block.ready_warps = 0;
    block.waited = false, block.at_cluster = 0;
    block.acquired.clear();
    for (Warp& warp : block.warps) warp = {};
    for (Object& object : block.shared) std::memset(object.memory, 0xff, object.bytes);
    for (int i = 0; i < kernel.block; ++i) {
        char* bottom = stacks + (static_cast<size_t>(slot) * kernel.block + i) * kStack;
        // The thread itself lies above its stack. Stack tops are spread so that they do not share cache sets.
        char* place = bottom + kStack - (sizeof(Thread) + 63) / 64 * 64 - i % 16 * 192;
        if (stale_stacks) __asan_unpoison_memory_region(bottom + kGuard, kStack - kGuard);
        Thread& t = *new (place) Thread;
        t.thread = {static_cast<unsigned>(i), 0, 0}, t.block = block.index;
        t.block_size = dim3(static_cast<unsigned>(kernel.block)), t.grid_size = kernel.grid;
        t.owner = &block, t.number = static_cast<uint32_t>(i), t.clock[t.lane()] = 1;
        t.stack_pointer = first_frame(bottom + kGuard, place, entry);
        block.threads[i] = &t;
        block.warps[i / 32].lanes |= 1u << t.lane();
        set_ready(t);
    }
    ++progress;
}

void finish(Block& block) {
    if (now.kernel->cluster && !block.waited) report("grid_wait: a block of a dependent launch ended without it");
    const Cluster cluster = cluster_of(block);
    for (const Block& other : cluster)
        if (other.live) return;  // its memory can still be asked for, which would be a fault
    for (Block& other : cluster) {
        for (int i = 0; i < now.kernel->block; ++i) other.threads[i]->~Thread();
        other.serial = 0;
    }
}

std::string table() {  // of what everybody waits for
    std::map<std::string, int> lines;
    for (Block& block : slots)
        for (int i = 0; block.serial && i < now.kernel->block; ++i) {
            Thread& t = *block.threads[i];
            if (t.state == State::kDone) continue;
            std::string line = text(Site::of(t.where));
            if (t.state == State::kWarp) line += number(" (mask %08x)", t.call->mask);
            lines[line] += 1;
        }
    std::string all;
    for (const auto& [line, count] : lines) all += "\n    " + std::to_string(count) + " threads wait at " + line;
    return all;
}

bool wake() {  // those who gave way
    bool any = false;
    for (Block& block : slots)
        for (int i = 0; block.serial && i < now.kernel->block; ++i)
            if (block.threads[i]->state == State::kYielded) set_ready(*block.threads[i]), any = true;
    return any;
}

Block* choose_block(Block* last) {
    if (policy == kRandom && last && last->ready_warps && roll(2)) return last;
    Block* found = nullptr;
    unsigned candidates = 0;
    for (Block& block : slots) {
        if (!block.serial || !block.ready_warps) continue;
        if (policy == kForward && found) break;
        if (policy != kRandom || roll(++candidates) == 0) found = &block;
    }
    return found;
}

void schedule(const std::vector<uint64_t>& order, size_t size) {  // of clusters of `size`
    size_t started = 0;
    uint64_t seen = ~0ull;
    int idle = 0;
    Block* block = nullptr;
    unsigned warp = 0;
    while (!hopeless) {
        for (size_t i = 0; i < slots.size(); i += size)
            if (!slots[i].serial && started < order.size())
                for (size_t rank = 0, first = order[started++] * size; rank < size; ++rank)
                    start(slots[i + rank], static_cast<int>(i + rank), first + rank);
        Block* const next = choose_block(block);
        if (!next) {
            bool any = false;
            for (Block& b : slots) any = any || b.serial;
            if (!any) return;
            idle = progress == seen ? idle + 1 : 0, seen = progress;
            if (!wake()) return report("deadlock: nobody can go on" + table()), hopeless = true, void();
            if (idle > 1000) return report("livelock: everybody waits for somebody else's write" + table()), hopeless = true, void();
            continue;
        }
        const bool stay = next == block && next->warps[warp].ready && policy == kRandom && roll(2);
        block = next;
        if (!stay) warp = pick(block->ready_warps);
        resume(*block->threads[warp * 32 + pick(block->warps[warp].ready)]);
        if (block->live == 0) finish(*block);
    }
}

}  // namespace

int run(const Kernel& kernel) {
    const dim3 g = kernel.grid;
    now = {&kernel, next_serial, 0, 0};
    begin_launch();
    if (kernel.block < 1 || kernel.block > kMaxThreads)
        report("launch: a block must have 1 to 1024 threads, got " + std::to_string(kernel.block));
    else if (g.x < 1 || g.y < 1 || g.z < 1 || g.x > INT32_MAX || g.y > 65535 || g.z > 65535)
        report("launch: the grid must have 1 to 2^31 - 1 blocks along x and 65535 along y and z");
    else if (g.x * static_cast<uint64_t>(g.y) * g.z > 1u << 22)
        report("launch: more blocks than are sensible here");
    else if (kernel.dynamic_bytes < 0 || static_cast<size_t>(kernel.dynamic_bytes) > kOptInLimit)
        report("launch: too much shared memory, " + std::to_string(kernel.dynamic_bytes) + " bytes dynamic");
    else if (g.x % std::max(kernel.cluster, 1) || (kernel.cluster & (kernel.cluster - 1)) || kernel.cluster > largest_cluster())
        report("launch: clusters of " + std::to_string(kernel.cluster) + " blocks cannot be made of the grid on this GPU");
    else {
        const size_t size = static_cast<size_t>(std::max(kernel.cluster, 1));
        const size_t most = (static_cast<size_t>(residents) + size - 1) / size * size;  // blocks at a time
        const size_t wanted = most * static_cast<size_t>(kernel.block);
        if (num_stacks < wanted) {
            if (stacks) munmap(stacks, num_stacks * kStack);
            num_stacks = wanted;
            const size_t bytes = num_stacks * kStack;
            stacks = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
            if (stacks == MAP_FAILED) std::abort();
            for (size_t at = 0; at < bytes; at += kStack)
                if (mprotect(stacks + at, kGuard, PROT_NONE)) std::abort();
            exempt(stacks, stacks + bytes);
            stale_stacks = true;
        }
        std::vector<uint64_t> order(static_cast<uint64_t>(g.x) * g.y * g.z / size);  // of clusters
        std::iota(order.begin(), order.end(), 0);
        if (policy == kReverse) std::reverse(order.begin(), order.end());
        if (policy == kRandom) std::shuffle(order.begin(), order.end(), dice);
        next_serial += static_cast<uint32_t>(order.size() * size);
        hopeless = false;
        slots = std::vector<Block>(std::min(most, order.size() * size));
        schedule(order, size);
        stale_stacks = hopeless;
    }
    here = nullptr;
    end_launch();
    return clean() ? 0 : cudaErrorLaunchFailure;
}

int barrier(Op op, int predicate, Where at) {
    if (gone(at)) return 0;
    Thread& t = self();
    Block& block = *t.owner;
    if (block.waiting == 0) block.barrier_op = op, block.barrier_at = at;
    else if (op != block.barrier_op || at.line() != block.barrier_at.line())
        report("barrier-divergence: threads of a block are in different barriers", Site::of(at), " and", Site::of(block.barrier_at));
    block.sum += predicate != 0, block.waiting += 1;
    set_waiting(t, State::kBarrier, at);
    if (block.waiting == block.live) open_barrier(block);
    to_scheduler();
    return t.result;
}

uint64_t warp(Call call) {
    if (call.op == Op::kSync && gone(call.at)) return 0;
    Thread& t = self();
    Block& block = *t.owner;
    Warp& warp = block.warps[t.number / 32];
    call.mask &= warp.lanes;
    if (!(call.mask >> t.lane() & 1)) {
        report(number("warp-mask: the caller is not in its mask %08x", call.mask), Site::of(call.at));
        return ~0ull;
    }
    if (call.mask & warp.exited) {
        report(number("warp-mask: lanes %08x of the mask have ended", call.mask & warp.exited), Site::of(call.at));
        call.mask &= ~warp.exited;
    }
    t.call = &call;
    warp.arrived |= 1u << t.lane();
    set_waiting(t, State::kWarp, call.at);
    try_warp(block, t.number / 32 * 32, call.mask);
    to_scheduler();
    return call.result;
}

bool now_and_then(unsigned sides) { return policy == kRandom && roll(sides) == 0; }

void yield() {
    Thread& t = self();
    set_waiting(t, State::kYielded, t.where);
    to_scheduler();
}

void before_atomic(const void* address, size_t size, Where at) {
    Thread& t = self();
    t.where = at;
    // In between others may run. Somebody who tries again and again waits for them.
    if (now_and_then(4) || ++t.atomics % 256 == 0) yield();
    touch(address, size, Access::kAtomic, Site::of(at));
}

void after_atomic(bool changed) { progress += changed; }

int largest_cluster() { return largest; }

Cluster cluster_of(Block& block) {
    const int size = std::max(now.kernel->cluster, 1);
    return {&slots[static_cast<size_t>(&block - slots.data()) / size * size], size};
}

void cluster_sync(bool ordered, Where at) {
    if (gone(at)) return;
    Thread& t = self();
    t.owner->at_cluster += 1, t.owner->ordered = ordered;
    set_waiting(t, State::kCluster, at);
    try_cluster(cluster_of(*t.owner));
    to_scheduler();
}

extern "C" [[gnu::visibility("default")]] void emu_config(int new_policy, unsigned seed, int new_residents, int new_largest) {
    policy = new_policy, residents = new_residents, largest = new_largest;
    dice.seed(seed + 1);
}

// Mutation: the barrier at this line of this file does nothing from now on.
extern "C" [[gnu::visibility("default")]] void emu_without(const char* file, unsigned line) { gone_file = file, gone_line = line; }

}  // namespace simt
