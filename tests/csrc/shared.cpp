// The GPU's shared memory: of a block, of its neighbours in a cluster, and copies to it in the background.
#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace simt {

const void* cluster_at(const void* shared, int rank, Where at) {
    Block& mine = *self().owner;
    const Cluster cluster = cluster_of(mine);
    const char* const place = static_cast<const char*>(shared);
    if (rank < 0 || rank >= cluster.size) {
        report("bounds: no block " + std::to_string(rank) + " in a cluster of " + std::to_string(cluster.size), Site::of(at));
        return shared;
    }
    for (const Object& object : mine.shared)
        if (place >= object.memory && place < object.memory + object.bytes)
            for (const Object& other : cluster.first[rank].shared)
                if (other.key == object.key) return other.memory + (place - object.memory);
    report("cluster: nothing is shared there, or block " + std::to_string(rank) + " has not begun", Site::of(at));
    return shared;
}

void grid_wait() { self().waited = self().owner->waited = true; }

void* shared(const void* key, size_t bytes, const char* name) {
    Block& block = *self().owner;
    for (const Object& object : block.shared)
        if (object.key == key) return object.memory;
    block.shared.push_back({key, device_memory(name, Kind::kShared, 0, {0}, bytes, &block), bytes});
    const size_t dynamic = static_cast<size_t>(now.kernel->dynamic_bytes);
    size_t fixed = 0;
    for (const Object& object : block.shared)
        if (object.key != &now) fixed += (object.bytes + 15) / 16 * 16;
    now.static_bytes = std::max(now.static_bytes, fixed);
    if (fixed > kPlainLimit || fixed + dynamic > (dynamic > kPlainLimit ? kOptInLimit : kPlainLimit))
        report("launch: too much shared memory, " + std::to_string(fixed) + " bytes static and " + std::to_string(dynamic) + " dynamic");
    return block.shared.back().memory;
}

void* dynamic_shared() { return shared(&now, static_cast<size_t>(now.kernel->dynamic_bytes), "dynamic"); }

void copy_async(void* to, const void* from, int size, int present, Where at) {
    Thread& t = self();
    if (reinterpret_cast<uintptr_t>(to) % size || reinterpret_cast<uintptr_t>(from) % size)
        report("misaligned: address of cp.async", Site::of(at));
    if (!is_shared(to)) return report("bounds: target of cp.async is not in shared memory", Site::of(at));
    if (present < 0 || present > size) return report("bounds: cp.async of more bytes than its size", Site::of(at));
    Copy copy = {static_cast<char*>(to), {}, size, t.group, at};
    touch(from, static_cast<size_t>(present), Access::kRead, Site::of(at));
    std::memcpy(copy.bytes, from, static_cast<size_t>(present));
    touch(to, static_cast<size_t>(size), Access::kWrite, Site::of(at));
    forget(to, static_cast<size_t>(size));
    if (now_and_then(2)) std::memcpy(to, copy.bytes, static_cast<size_t>(size));  // arrives early
    else std::memset(to, 0xff, static_cast<size_t>(size));
    t.copies.push_back(copy);
}

void commit_async() { self().group += 1; }

void wait_async(int pending) {
    Thread& t = self();
    std::erase_if(t.copies, [&](const Copy& copy) {
        if (copy.group >= t.group - pending) return false;
        std::memcpy(copy.to, copy.bytes, static_cast<size_t>(copy.size));
        touch(copy.to, static_cast<size_t>(copy.size), Access::kWrite, Site::of(copy.at));
        return true;
    });
}

}  // namespace simt
