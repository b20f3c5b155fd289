// Counters in shared memory: what each rank tells the others about its progress.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "shared_memory.h"

namespace pyshard {

// A number that one process increases and others read, alone in its cache line.
struct alignas(64) Counter {
  std::atomic<uint64_t> value;
};
static_assert(std::atomic<uint64_t>::is_always_lock_free, "processes share it");

// `count` counters of each rank, at the same offset of its memory. A rank writes its own ones only, and they only grow.
// What it wrote to memory before advance() is there for whoever has seen reached().
class Counters {
 public:
  Counters(std::vector<std::shared_ptr<SharedMemory>> memories, size_t rank, size_t offset, size_t count)
      : memories_(std::move(memories)), rank_(rank), offset_(offset), count_(count) {
    if (rank >= memories_.size()) throw std::invalid_argument("pyshard._C.Counters: rank out of range");
    for (const auto& memory : memories_)
      if (!memory || offset % sizeof(Counter) || memory->bytes() < offset + count * sizeof(Counter))
        throw std::invalid_argument("pyshard._C.Counters: memory too small, or offset not a multiple of 64");
  }

  void advance(size_t index) {
    std::atomic<uint64_t>& own = value(rank_, index);
    own.store(own.load(std::memory_order_relaxed) + 1, std::memory_order_release);
  }
  bool has_reached(size_t rank, size_t index, uint64_t target) const {
    return value(rank, index).load(std::memory_order_acquire) >= target;
  }
  // True if every rank's counter has.
  bool reached(size_t index, uint64_t target) const {
    for (size_t rank = 0; rank < memories_.size(); ++rank)
      if (!has_reached(rank, index, target)) return false;
    return true;
  }

 private:
  std::atomic<uint64_t>& value(size_t rank, size_t index) const {
    if (index >= count_) throw std::out_of_range("pyshard._C.Counters: no such counter");
    return reinterpret_cast<Counter*>(memories_[rank]->data() + offset_)[index].value;
  }

  std::vector<std::shared_ptr<SharedMemory>> memories_;
  size_t rank_, offset_, count_;
};

}  // namespace pyshard
