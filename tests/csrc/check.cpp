// The emulator's checker: device memory with guard gaps and (race build: SIMT_RACE) the shadow of every word: bounds,
// uninitialised shared memory, races.
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define __asan_poison_memory_region(memory, size) (void)0
#define __asan_unpoison_memory_region(memory, size) (void)0
#endif

#define EXPORT extern "C" [[gnu::visibility("default")]]

namespace simt {
namespace {

struct Range {
    uintptr_t low = 0, high = 0;
    bool holds(uintptr_t at) const { return at - low < high - low; }
};
Range image, stacks, host_stack;  // of this library, of the fibers, of the thread that launches

// --- device memory ------------------------------------------------------------------------------------------------------

constexpr size_t kArena = 1ull << 34, kGap = 64 * 1024, kSharedGap = 256, kPage = 4096;

char* reserve(size_t bytes) {  // zeros, there when touched
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    return static_cast<char*>(memory);
}

struct Region {
    std::string name;
    Kind kind;
    char *low, *high;
    Block* owner;  // of shared memory
};
struct Tensor {  // of the host, with its place in device memory
    char *host, *memory;
    std::vector<size_t> rows;
    size_t row_bytes;
    bool output;
};
char* const arena = reserve(kArena);
char *cursor = arena, *shared_from = arena;
std::vector<Region> regions;  // ascending
std::vector<Tensor> tensors;

#if defined(SIMT_RACE)
struct Record {  // of an access
    uint32_t block, epoch, clock;
    uint16_t thread;
    bool atomic;
    Site site;
};
struct Cell {  // of a word; of a byte in words that saw smaller accesses
    Record write, read[3];
    uint16_t region;  // number + 1; 0: nobody's memory
    uint8_t valid;    // its bytes, as bits
    bool split;
};
Cell* const words = reinterpret_cast<Cell*>(reserve(kArena / 4 * sizeof(Cell)));
Cell* const bytes = reinterpret_cast<Cell*>(reserve(kArena * sizeof(Cell)));

struct Statistic {
    uint64_t launches, blocks, threads, switches, static_bytes, dynamic_bytes, read, read_distinct, written, written_distinct;
};
std::map<std::string, Statistic> statistics;
Statistic* counts = nullptr;
std::map<uintptr_t, std::vector<Release>> offers;  // by address of the atomic
#endif

void mark([[maybe_unused]] char* row, [[maybe_unused]] size_t size) {  // as memory of the last region
    __asan_unpoison_memory_region(row, size);
#if defined(SIMT_RACE)
    for (size_t at = row - arena; at < static_cast<size_t>(row - arena) + size; ++at)
        words[at / 4].region = static_cast<uint16_t>(regions.size()), words[at / 4].valid |= 1 << at % 4;
#endif
}

void release(char* from) {
    if (from == cursor) return;
    const size_t low = (from - arena) / kPage * kPage, high = (cursor - arena + kPage - 1) / kPage * kPage;
    __asan_unpoison_memory_region(from, static_cast<size_t>(cursor - from));
    madvise(arena + low, high - low, MADV_DONTNEED);
#if defined(SIMT_RACE)
    madvise(reinterpret_cast<char*>(words) + low / 4 * sizeof(Cell), (high - low) / 4 * sizeof(Cell), MADV_DONTNEED);
    madvise(reinterpret_cast<char*>(bytes) + low * sizeof(Cell), (high - low) * sizeof(Cell), MADV_DONTNEED);
#endif
    while (!regions.empty() && regions.back().low >= from) regions.pop_back();
    cursor = from;
}

}  // namespace

void exempt(const void* low, const void* high) { stacks = {reinterpret_cast<uintptr_t>(low), reinterpret_cast<uintptr_t>(high)}; }

bool is_shared(const void* at) { return at >= shared_from && at < cursor; }

char* device_memory(const char* name, Kind kind, size_t misalignment, const std::vector<size_t>& rows, size_t row_bytes,
                    Block* owner) {
    const size_t span = rows.empty() ? 0 : *std::max_element(rows.begin(), rows.end()) + row_bytes;
    const size_t gap = kind == Kind::kShared && cursor != shared_from ? kSharedGap : kGap;
    char* const memory = arena + (cursor - arena + gap + 127) / 128 * 128 + misalignment;
    char* const end = arena + (memory - arena + span + gap + 7) / 8 * 8;
    if (end > arena + kArena) std::fprintf(stderr, "simt: too little device memory\n"), std::abort();
    __asan_poison_memory_region(cursor, static_cast<size_t>(end - cursor));
    for (size_t row : rows) {  // and what is near: rows may lie gigabytes apart
        char* const low = memory + row - kSharedGap;
        __asan_unpoison_memory_region(low, row_bytes + 2 * kSharedGap);
        std::memset(low, 0xff, row_bytes + 2 * kSharedGap);
        __asan_poison_memory_region(low, row_bytes + 2 * kSharedGap);
    }
    cursor = end;
    regions.push_back({name, kind, memory, memory + span, owner});
    for (size_t row : rows) mark(memory + row, row_bytes);
    return memory;
}

void begin_launch() {
    if (!image.high)
        dl_iterate_phdr([](dl_phdr_info* info, size_t, void*) {
            Range all{~0ull, 0};
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const auto& part = info->dlpi_phdr[i];
                if (part.p_type != PT_LOAD) continue;
                all.low = std::min<uintptr_t>(all.low, info->dlpi_addr + part.p_vaddr);
                all.high = std::max<uintptr_t>(all.high, info->dlpi_addr + part.p_vaddr + part.p_memsz);
            }
            if (all.holds(reinterpret_cast<uintptr_t>(&image))) image = all;
            return 0;
        }, nullptr);
    const auto frame = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    if (!host_stack.holds(frame)) {
        pthread_attr_t attributes;
        void* low;
        size_t size;
        pthread_getattr_np(pthread_self(), &attributes);
        pthread_attr_getstack(&attributes, &low, &size);
        pthread_attr_destroy(&attributes);
        host_stack = {reinterpret_cast<uintptr_t>(low), reinterpret_cast<uintptr_t>(low) + size};
    }
    shared_from = cursor;
#if defined(SIMT_RACE)
    offers.clear();
    counts = &statistics[now.kernel->name];
    const dim3 g = now.kernel->grid;
    counts->launches += 1, counts->blocks += static_cast<uint64_t>(g.x) * g.y * g.z;
    counts->threads = static_cast<uint64_t>(now.kernel->block);
    counts->dynamic_bytes = std::max(counts->dynamic_bytes, static_cast<uint64_t>(now.kernel->dynamic_bytes));
#endif
}

void end_launch() {
    release(shared_from);
#if defined(SIMT_RACE)
    counts->switches += now.switches;
    counts->static_bytes = std::max(counts->static_bytes, static_cast<uint64_t>(now.static_bytes));
#endif
    now.kernel = nullptr;
}

// --- happens-before -------------------------------------------------------------------------------------------------------

#if !defined(SIMT_RACE)
void touch(const void*, size_t, Access, Site) {}
void forget(const void*, size_t) {}
void join(const Warp&, Thread* const*, unsigned) {}
void join(const Cluster&) {}
void fence() {}
void release(const void*, bool) {}
void acquire(const void*, bool) {}
#else
namespace {

bool holds(const Acquired& a) { return a.by == self().number || a.epoch < self().owner->epoch; }

bool ordered(const Record& r) {  // before what the running thread does now
    const Thread& t = self();
    if (r.block == t.owner->serial)
        return r.epoch < t.owner->epoch || r.thread == t.number ||
               (r.thread / 32u == t.number / 32 && t.clock[r.thread % 32] >= r.clock);
    const auto [first, last] = t.owner->acquired.equal_range(r.block);
    return std::any_of(first, last, [&](const auto& entry) {
        const Release& a = entry.second.release;
        return holds(entry.second) && (r.epoch < a.epoch || (r.epoch == a.epoch && r.thread == a.thread && r.clock <= a.clock));
    });
}

std::string place(const char* at) {
    const Region* near = nullptr;
    for (const Region& region : regions)
        if (!near || region.low <= at) near = &region;
    if (!near) return "memory of the host";
    return std::string(near->kind == Kind::kShared ? "shared '" : "'") + near->name + "'" + (at < near->low ? "" : "+") +
           std::to_string(at - near->low) + (near->kind == Kind::kShared ? "" : " of " + std::to_string(near->high - near->low));
}

const char* name(Access access) { return access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "atomic"; }

void check(Cell& cell, const char* at, size_t size, const Region& region, Access access, Site site) {
    const Thread& t = self();
    const bool shared = region.kind == Kind::kShared, atomic = access == Access::kAtomic;
    const auto current = [&](const Record& r) { return shared ? cluster_of(*t.owner).holds(r.block) : r.block >= now.first_serial; };
    const auto conflict = [&](const Record& r, const char* kind) {
        if (!current(r) || (atomic && r.atomic) || ordered(r)) return;
        report("race: " + std::string(name(access)) + " of " + std::to_string(size) + " bytes at " + place(at), site,
               " conflicts with " + std::string(r.atomic ? "atomic" : kind) + " by thread " + std::to_string(r.thread) +
               (r.block == t.owner->serial ? "" : " of another block"), r.site);
    };
    if (access != Access::kWrite && shared && !current(cell.write))
        report("uninitialised: " + std::string(name(access)) + " of " + std::to_string(size) + " bytes at " + place(at), site);
    conflict(cell.write, "write");
    const Record mine = {t.owner->serial, t.owner->epoch, t.clock[t.lane()], static_cast<uint16_t>(t.number), atomic, site};
    if (access == Access::kRead) {
        // Replace what can no longer conflict, else a reader of the same warp: the rest stays as different as possible.
        if (!shared && !std::any_of(std::begin(cell.read), std::end(cell.read), current)) counts->read_distinct += size;
        Record* place = &cell.read[2];
        for (Record& r : cell.read)
            if (!current(r) || (r.block == mine.block && r.thread == mine.thread) || ordered(r)) { place = &r; break; }
            else if (r.block == mine.block && r.thread / 32 == mine.thread / 32) place = &r;
        *place = mine;
    } else {
        for (const Record& r : cell.read) conflict(r, "read");
        if (!shared && !current(cell.write)) counts->written_distinct += size, counts->read_distinct += atomic ? size : 0;
        cell.write = mine;
    }
}

}  // namespace

void touch(const void* address, size_t size, Access access, Site site) {
    const auto value = reinterpret_cast<uintptr_t>(address);
    if (!here || stacks.holds(value) || image.holds(value) || host_stack.holds(value) || size == 0) return;
    const char* at = static_cast<const char*>(address);
    const size_t first = static_cast<size_t>(at - arena);
    Thread& t = self();
    for (size_t i = first; i < first + size;) {
        const size_t part = std::min(4 - i % 4, first + size - i);
        const unsigned mask = ((1u << part) - 1) << i % 4;
        if (i >= kArena || (words[i / 4].valid & mask) != mask)
            return report("bounds: " + std::string(name(access)) + " of " + std::to_string(size) + " bytes at " + place(at), site);
        Cell& word = words[i / 4];
        const Region& region = regions[word.region - 1u];
        if (region.kind == Kind::kInput && access != Access::kRead) return report("read-only: write to input " + place(at), site);
        if (region.kind == Kind::kShared && region.owner != t.owner &&
            !(cluster_of(*t.owner).holds(region.owner->serial) && region.owner->live))
            return report("cluster: " + std::string(name(access)) + " of " + place(at) + " of a block that has ended", site);
        if (region.kind != Kind::kShared) {
            if (now.kernel->cluster && !t.waited) return report("grid_wait: " + std::string(name(access)) + " of " + place(at) + " before it", site);
            if (access != Access::kWrite) counts->read += part;
            if (access != Access::kRead) counts->written += part, t.fenced = t.fenced && access == Access::kAtomic;
        }
        if (part == 4 && !word.split) {
            check(word, at, 4, region, access, site);
        } else {
            if (!word.split) std::fill_n(bytes + i / 4 * 4, 4, word);
            word.split = true;
            for (size_t b = i; b < i + part; ++b) check(bytes[b], at, 1, region, access, site);
        }
        i += part;
    }
}

void forget(const void* address, size_t size) {
    const size_t first = static_cast<size_t>(static_cast<const char*>(address) - arena);
    for (size_t i = first; i < first + size; ++i) words[i / 4].write.block = bytes[i].write.block = 0;
}

void join(const Warp&, Thread* const* lanes, unsigned mask) {
    std::array<uint32_t, 32> clock = {};
    for (unsigned lane = 0; lane < 32; ++lane)
        for (unsigned i = 0; i < 32 && mask >> lane & 1; ++i) clock[i] = std::max(clock[i], lanes[lane]->clock[i]);
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) std::copy(clock.begin(), clock.end(), lanes[lane]->clock), lanes[lane]->clock[lane] += 1;
}

void join(const Cluster& cluster) {
    for (Block& block : cluster)
        for (const Block& other : cluster)
            if (other.serial != block.serial)
                block.acquired.insert({other.serial, {{other.serial, other.epoch, 0, 0}, 0, block.epoch - 1}});
}

void fence() {
    Thread& t = self();
    t.fenced = true, t.fence_epoch = t.owner->epoch, t.fence_clock = t.clock[t.lane()]++;
    for (const Release& r : t.offered) t.owner->acquired.insert({r.block, {r, t.number, t.owner->epoch}});
    t.offered.clear();
}

void release(const void* address, bool always) {
    Thread& t = self();
    if (is_shared(address) || !(t.fenced || always)) return;
    std::vector<Release>& offer = offers[reinterpret_cast<uintptr_t>(address)];
    const uint32_t clock = always ? t.clock[t.lane()]++ : t.fence_clock;
    offer.push_back({t.owner->serial, always ? t.owner->epoch : t.fence_epoch, t.number, clock});
    for (const auto& [block, acquired] : t.owner->acquired)
        if (holds(acquired)) offer.push_back(acquired.release);
}

void acquire(const void* address, bool always) {
    Thread& t = self();
    if (is_shared(address)) return;
    for (const Release& r : offers[reinterpret_cast<uintptr_t>(address)]) {
        if (r.block == t.owner->serial) continue;
        if (always) t.owner->acquired.insert({r.block, {r, t.number, t.owner->epoch}});
        else t.offered.push_back(r);
    }
}
#endif

}  // namespace simt

// --- interface of the tests -------------------------------------------------------------------------------------------------

// A place in device memory for a tensor of the host: `axes` sizes and strides in bytes (not negative) of rows of `row_bytes`.
// output 0: kernels read it; 1: they fill it; 2: both.
EXPORT void* emu_take(const char* name, void* host, int64_t row_bytes, int axes, const int64_t* sizes, const int64_t* strides, int output) {
    using namespace simt;
    if (!host) return nullptr;
    std::vector<size_t> rows(row_bytes > 0 ? 1 : 0);
    for (int a = 0; a < axes; ++a) {
        std::vector<size_t> next;
        for (size_t row : rows)
            for (int64_t i = 0; i < (strides[a] ? sizes[a] : std::min<int64_t>(sizes[a], 1)); ++i) next.push_back(row + i * strides[a]);
        rows.swap(next);
    }
    char* const from = static_cast<char*>(host);
    char* memory = device_memory(name, output ? Kind::kOutput : Kind::kInput, reinterpret_cast<uintptr_t>(from) % 128, rows, row_bytes);
    if (output != 1)
        for (size_t row : rows) std::memcpy(memory + row, from + row, row_bytes);
    tensors.push_back({from, memory, std::move(rows), static_cast<size_t>(row_bytes), output != 0});
    return memory;
}

// Copies outputs to the host and gives all device memory back.
EXPORT void emu_give_back() {
    using namespace simt;
    for (const Tensor& t : tensors)
        for (size_t row : t.rows)
            if (t.output) std::memcpy(t.host + row, t.memory + row, t.row_bytes);
    tensors.clear();
    release(arena);
}

#if defined(SIMT_RACE)
// Tab-separated lines: kernel, launches, blocks, threads, switches, shared memory static and dynamic, global bytes read,
// distinct, written, distinct. Then all counts are 0.
EXPORT const char* emu_statistics() {
    static std::string all;
    all.clear();
    for (const auto& [name, s] : simt::statistics) {
        all += name;
        for (uint64_t value : {s.launches, s.blocks, s.threads, s.switches, s.static_bytes, s.dynamic_bytes, s.read, s.read_distinct,
                               s.written, s.written_distinct})
            all += "\t" + std::to_string(value);
        all += "\n";
    }
    simt::statistics.clear();
    return all.c_str();
}
#endif
