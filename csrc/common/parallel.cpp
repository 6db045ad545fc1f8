#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace crop {
namespace {

struct Pool {
    std::mutex busy;  // held by the caller whose job runs
    std::mutex mutex;
    std::condition_variable wake, done;
    int workers = 0;

    // The current job, guarded by mutex except for the item counter.
    uint64_t job = 0;
    int seats = 0;    // workers that may still join
    int running = 0;  // workers that have joined and not finished
    int64_t items = 0;
    void (*body)(void*, int64_t) = nullptr;
    void* context = nullptr;
    std::fenv_t floats{};  // rounding and denormals of the caller
    std::atomic<int64_t> next{0};

    void work() {
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, item);
    }

    void worker() {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            wake.wait(lock, [&] { return job != seen && seats > 0; });
            seen = job;
            --seats;
            ++running;
            const std::fenv_t callers = floats;
            lock.unlock();
            std::fesetenv(&callers);
            work();
            lock.lock();
            if (--running == 0) done.notify_one();
        }
    }

    void run(int threads, int64_t count, void (*function)(void*, int64_t), void* argument) {
        std::unique_lock<std::mutex> lock(mutex);
        try {
            for (; workers < threads - 1; ++workers) std::thread(&Pool::worker, this).detach();
        } catch (const std::exception&) {  // no more threads now: those that exist do the work
        }
        items = count, body = function, context = argument;
        std::fegetenv(&floats);
        next.store(0, std::memory_order_relaxed);
        seats = threads - 1;
        ++job;
        lock.unlock();
        if (threads == 2) wake.notify_one();
        else wake.notify_all();
        work();
        lock.lock();
        seats = 0;  // nobody joins late: the caller waits for those at work only
        done.wait(lock, [&] { return running == 0; });
    }
};

// Never destroyed: its threads are detached and may outlive static destructors.
std::atomic<Pool*> pool{nullptr};

Pool* get_pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    (void)registered;
    Pool* current = pool.load();
    if (current) return current;
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(current, fresh)) return fresh;
    delete fresh;
    return current;
}

}  // namespace

void parallel_items(int threads, int64_t items, void (*body)(void*, int64_t), void* context) {
    if (threads > items) threads = static_cast<int>(items);
    if (threads > 1) {
        Pool* shared = get_pool();
        if (shared->busy.try_lock()) {
            shared->run(threads, items, body, context);
            shared->busy.unlock();
            return;
        }
    }
    for (int64_t item = 0; item < items; ++item) body(context, item);
}

}  // namespace crop
