// A small persistent thread pool. Work items are claimed one by one, so an operator must give each item its own output
// and a fixed order inside the item: then the result cannot depend on the number of threads.
#pragma once
#include <cstdint>

namespace crop {

// Calls body(context, item) for every item in [0, items) on up to `threads` threads, the caller among them; returns when
// all are done. Runs in the caller alone when the pool is busy (calls from several threads, nested calls), and on fewer
// threads when the system has no more. All threads round and flush denormals as the caller does.
// Safe after fork: the child starts a new pool when it first needs one.
void parallel_items(int threads, int64_t items, void (*body)(void*, int64_t), void* context);

template <class Body>
void parallel_for(int threads, int64_t items, Body& body) {
    parallel_items(threads, items, [](void* context, int64_t item) { (*static_cast<Body*>(context))(item); }, &body);
}

// As many threads as there are pieces of `grain` in `work`: waking a thread costs more than a small piece of work.
// Static: kernels are compiled once per instruction set, and the linker must not choose one of their copies for all.
static inline int useful_threads(int threads, int64_t work, int64_t grain) {
    const int64_t pieces = work / grain;
    return pieces < 1 ? 1 : pieces < threads ? static_cast<int>(pieces) : threads;
}

}  // namespace crop
