// How long work and long waits outside the interpreter let Ctrl-C through.
#pragma once

#include <chrono>

namespace pyshard {

using Clock = std::chrono::steady_clock;

// Thrown where a signal's handler wants to end what this thread does.
struct Interrupt {};

// Asks `signalled` every 50 ms at most: asking takes the interpreter's lock.
class Interrupts {
 public:
  explicit Interrupts(bool (*signalled)()) : signalled_(signalled) {}

  void look(Clock::time_point now = Clock::now()) {
    if (now < next_) return;
    if (signalled_()) throw Interrupt{};
    next_ = now + std::chrono::milliseconds(50);
  }

 private:
  bool (*signalled_)();
  Clock::time_point next_ = Clock::now() + std::chrono::milliseconds(50);
};

}  // namespace pyshard
