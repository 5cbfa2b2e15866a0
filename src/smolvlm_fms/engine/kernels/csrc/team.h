// The threads of one call that runs through many short phases.
#pragma once
#include <sched.h>

#include "common.h"

namespace SVK_ISA {

SVK_INLINE long next_item(long* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

// A barrier for phases of microseconds: the threads watch a word, and give their core away when the wait is long
// because there are more threads than cores. Between calls nobody waits here.
struct Barrier {
  alignas(64) int arrived = 0;
  alignas(64) int phase = 0;

  void wait(int threads) {
    if (threads == 1) return;
    const int now = __atomic_load_n(&phase, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == threads) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&phase, now + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&phase, __ATOMIC_ACQUIRE) == now; spins++)
      spins < 2000 ? pause_core() : (void)sched_yield();
  }
};

}  // namespace SVK_ISA
