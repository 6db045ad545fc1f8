// What the parts of the emulator share (scheduler simt.cpp, warp operations warp.cpp, shared memory shared.cpp, checker check.cpp with
// hooks.cpp, reports.cpp): threads, blocks, the launch in progress.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "simt.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace simt {

constexpr int kMaxThreads = 1024;
constexpr size_t kPlainLimit = 48 * 1024;  // of shared memory without opt-in; LAUNCH makes it for much dynamic memory
constexpr size_t kOptInLimit = 99 * 1024;  // on the smallest of the GPUs that kernels are built for

// A source line: of a call into the runtime, or (race build) the program counter of an instrumented access.
struct Site {
    uint64_t raw = 0;
    static constexpr uint64_t kCounter = 1ull << 63;
    static Site of(Where at) { return {std::bit_cast<uint64_t>(at)}; }
    static Site of(const void* counter) { return {reinterpret_cast<uint64_t>(counter) | kCounter}; }
};

// What somebody else may rely on after a release: the releasing block up to an epoch (its barriers), and within this epoch
// the accesses of the releasing thread up to a clock.
struct Release {
    uint32_t block, epoch, thread, clock;
};
struct Acquired {
    Release release;
    uint32_t by, epoch;  // holds for this thread at once, for its block after a barrier
};

struct Copy {  // cp.async on its way
    char* to;
    char bytes[16];
    int size, group;
    Where at;
};

enum class State : uint8_t { kReady, kYielded, kBarrier, kCluster, kWarp, kDone };

struct Block;
struct Thread : Position {
    Block* owner = nullptr;
    uint32_t number = 0;
    State state = State::kReady;
    void* stack_pointer = nullptr;
    void* fake_stack = nullptr;  // of AddressSanitizer
    Call* call = nullptr;        // the warp operation it waits in
    Where where;                 // it waits
    int result = 0;              // of the last barrier
    unsigned atomics = 0;
    std::vector<Copy> copies;
    int group = 0;         // of the next copy
    bool waited = false;   // grid_wait
    uint32_t clock[32] = {};  // of the lanes of its warp, as far as it knows them
    bool fenced = false;   // and no write to global memory since
    uint32_t fence_epoch = 0, fence_clock = 0;
    std::vector<Release> offered;  // by atomics since its last fence

    unsigned lane() const { return number % 32; }
};

struct Warp {
    unsigned lanes = 0, ready = 0, yielded = 0, arrived = 0, exited = 0;
};

struct Object {  // of shared memory
    const void* key;
    char* memory;
    size_t bytes;
};

struct Block {
    uint3 index;
    uint32_t serial = 0, epoch = 0;
    unsigned ready_warps = 0;
    int live = 0, waiting = 0, sum = 0;
    Op barrier_op;
    Where barrier_at;
    Warp warps[32];
    Thread* threads[kMaxThreads];
    int at_cluster = 0;          // threads that wait for the cluster
    bool ordered = true;         // and will see what the others wrote
    std::vector<Object> shared;  // outlives the block: the next one in its place has the same
    std::multimap<uint32_t, Acquired> acquired;  // by releasing block
    bool waited = false;  // some thread called grid_wait
};

// The blocks of a cluster run at the same time, in neighbouring slots.
struct Cluster {
    Block* first;
    int size;

    Block* begin() const { return first; }
    Block* end() const { return first + size; }
    bool holds(uint32_t serial) const { return serial - first->serial < static_cast<uint32_t>(size); }
};
Cluster cluster_of(Block&);

struct Launch {
    const Kernel* kernel;
    uint32_t first_serial;  // smaller numbers are blocks of earlier launches
    size_t static_bytes;    // of shared memory
    uint64_t switches;
};
extern Launch now;
bool now_and_then(unsigned sides);  // in one of so many cases where chance decides, never else
void execute(Block&, unsigned first, unsigned mask);  // a warp operation of the lanes `mask` from thread `first` on
inline Thread& self() { return *static_cast<Thread*>(here); }

// --- checker --------------------------------------------------------------------------------------------------------

enum class Access : uint8_t { kRead, kWrite, kAtomic };
enum class Kind : uint8_t { kInput, kOutput, kShared };

// Records a problem once per kind (the text up to the colon) and places. The running thread is named where there is one.
void report(const std::string& what, Site at = {}, const std::string& then = "", Site other = {});
std::string text(Site);
bool clean();

// Poisoned memory that kernels may touch: `rows` (offsets) of `row_bytes` each. What lies around them is out of bounds.
// Shared memory is that of `owner`.
char* device_memory(const char* name, Kind, size_t misalignment, const std::vector<size_t>& rows, size_t row_bytes,
                    Block* owner = nullptr);
bool is_shared(const void*);
void exempt(const void* low, const void* high);  // memory of the emulator itself

void begin_launch();
void end_launch();
void touch(const void*, size_t, Access, Site);
void forget(const void*, size_t);  // it is being overwritten: what it held is gone
void join(const Warp&, Thread* const* lanes, unsigned mask);  // __syncwarp
void join(const Cluster&);                                     // cluster_sync: behind its opening

}  // namespace simt
