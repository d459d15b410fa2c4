// The units of the op that is open, as threads take and finish them. Part of executor.cpp.
//
// There is no barrier. Threads take ranges of units while there are any; whoever finishes the last unit opens the next
// op. A thread that is late, asleep or preempted holds up nobody unless it holds units. With a barrier after each op
// all waited for the core of the one that was pushed off it, 240 times a step: decode of one row with two threads on
// two cores that three to five other processes wanted took 31 to 59 ms in the median, without barriers 8 to 12
// (quiet: 2.4 either way).
//
// All there is to know about the open op is in one word. A late thread that still has the word of an op that is over
// takes nothing, as its compare-and-swap fails; should the word of a later op be equal, then what it takes are units of
// that op. What a taken unit reads (the op's arguments) stays as it is until the unit is finished, as the op cannot be
// over before.
#pragma once

#include <atomic>
#include <cstdint>

#include "layout.h"

namespace headrace {

class Units {
 public:
  static constexpr int kMost = INT32_MAX / 2;
  static constexpr int kUnevenShares = 8;

  struct Range {
    int begin, end;
    int units;  // of the op, in all
    int size() const { return end - begin; }
  };

  // What the units of an op are like: kCoarse, ranges are multiples of kColumns rows; kUneven, some units are far more
  // work than others, the most first, so that even the first range must be a small part of all.
  enum Kind { kEven = 0, kUneven = 1, kCoarse = 2 };

  // Open the next op. Called when all units of the one before are finished, by one thread. Release: who takes a unit
  // sees what was written before.
  void open(int units, Kind kind) {
    finished_.store(0, std::memory_order_relaxed);
    word_.store((uint64_t)kind << 62 | (uint64_t)units << 32, std::memory_order_release);
  }

  // The next units, one in `shares` of what is left: ranges are long at first, for streaming, and short at the end, for
  // balance beside a busy core. False where none are left at this moment. Decode of 1, 4, 16 rows on two threads, ms:
  // with one share a thread 1.9, 2.3, 6.2; two 2.0, 2.7, 6.8; eight 2.6, 3.3, 7.5.
  bool take(int shares, Range& range) {
    uint64_t word = word_.load(std::memory_order_acquire);
    for (;;) {
      const int units = (int)(word >> 32 & INT32_MAX / 2), begin = (int)(uint32_t)word;
      const Kind kind = (Kind)(word >> 62);
      const int grain = kind == kCoarse ? kColumns : 1;
      if (begin >= units) return false;
      int size = (units - begin) / (kind == kUneven ? kUnevenShares * shares : shares) / grain * grain;
      if (size < grain) size = grain;
      const int end = units - begin <= size ? units : begin + size;
      if (word_.compare_exchange_weak(word, word + (uint64_t)(end - begin), std::memory_order_acq_rel,
                                      std::memory_order_acquire)) {
        range = {begin, end, units};
        return true;
      }
    }
  }

  // Say that taken units are done. True for the one call that finishes the op; that thread has then seen what all
  // others wrote.
  bool finish(const Range& range) {
    return finished_.fetch_add(range.size(), std::memory_order_acq_rel) + range.size() == range.units;
  }

 private:
  // Bits 0-31: units taken; 32-61: units; 62-63: kind.
  alignas(kAlign) std::atomic<uint64_t> word_{0};
  alignas(kAlign) std::atomic<int> finished_{0};
};

}  // namespace headrace
