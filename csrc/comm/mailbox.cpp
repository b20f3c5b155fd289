#include "mailbox.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434  // Linux 5.3, the same number on all architectures
#endif

namespace pyshard {

using std::chrono::microseconds;
using std::chrono::milliseconds;

// A payload larger than this goes in several rounds.
constexpr size_t kAreaBytes = size_t{1} << 20;

enum State : uint32_t { kRunning = 0, kFailed, kLeft };

// All zeros is its first state.
struct Control {
  char token[Mailbox::kTokenBytes];
  Counter round;
  std::atomic<uint64_t> payload_bytes[2];
  std::atomic<uint32_t> state;
  std::atomic<uint32_t> waiting;
  std::atomic<uint64_t> blames;  // 1 + the rank because of which a wait of this rank has ended; 0: none
  Note operation, message;
  // Rounds take turns: a rank enters the next but one only after all ranks have read this one.
  alignas(64) char areas[2][kAreaBytes];
};
static_assert(offsetof(Control, round) == Mailbox::kTokenBytes);

namespace {

// A wait first spins, if every rank can have a CPU of its own; then it lets others run; then it sleeps.
constexpr microseconds kSpin{50}, kYield{500}, kShortNap{20}, kLongNap{200};
constexpr milliseconds kLook{1};           // between two looks at the peers: one system call
constexpr milliseconds kLookClosely{100};  // and this one costs some 20 us for each

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// True from the moment that a process has begun to end. Its descriptor tells only when it has given back its memory, at
// 50 ms or more for each GB that it maps, or has written a core dump.
bool is_ending(pid_t pid) {
  const int fd = open(("/proc/" + std::to_string(pid) + "/stat").c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  char text[512];
  const ssize_t length = read(fd, text, sizeof text - 1);
  close(fd);
  text[std::max<ssize_t>(length, 0)] = 0;
  const char* name_end = std::strrchr(text, ')');
  unsigned flags = 0;
  if (!name_end || std::sscanf(name_end + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) != 1) return false;
  constexpr unsigned kExiting = 0x4, kSignaled = 0x400;  // PF_EXITING, PF_SIGNALED of the main thread
  return flags & (kExiting | kSignaled);
}

bool cpus_for(size_t ranks) {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 && static_cast<size_t>(CPU_COUNT(&set)) >= ranks;
}

}  // namespace

void Note::write(std::string_view text) {
  const size_t bytes = std::min(text.size(), sizeof words_);
  const uint32_t version = version_.load(std::memory_order_relaxed);
  version_.store(version + 1, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);
  bytes_.store(static_cast<uint32_t>(bytes), std::memory_order_relaxed);
  for (size_t i = 0; i < bytes; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, text.data() + i, std::min<size_t>(8, bytes - i));
    words_[i / 8].store(word, std::memory_order_relaxed);
  }
  version_.store(version + 2, std::memory_order_release);
}

std::string Note::read() const {
  char text[sizeof words_];
  size_t bytes = 0;
  // A writer that was killed in the middle leaves an odd version: then what is there must do.
  for (int attempt = 0; attempt < 100; ++attempt) {
    const uint32_t before = version_.load(std::memory_order_acquire);
    bytes = std::min<size_t>(bytes_.load(std::memory_order_relaxed), sizeof text);
    for (size_t i = 0; i < bytes; i += 8) {
      const uint64_t word = words_[i / 8].load(std::memory_order_relaxed);
      std::memcpy(text + i, &word, 8);
    }
    std::atomic_thread_fence(std::memory_order_acquire);
    if (before % 2 == 0 && version_.load(std::memory_order_relaxed) == before) break;
    sched_yield();
  }
  return std::string(text, bytes);
}

size_t Mailbox::block_bytes() { return sizeof(Control); }

Mailbox::Mailbox(std::vector<std::shared_ptr<SharedMemory>> memories, const std::vector<pid_t>& pids, size_t rank,
                 bool (*signalled)())
    : memories_(std::move(memories)),
      rank_(rank),
      signalled_(signalled),
      pid_(getpid()),
      spin_(cpus_for(memories_.size())),
      rounds_(memories_, rank, offsetof(Control, round), 1),
      pids_(pids) {
  for (const auto& memory : memories_)
    if (memory->bytes() < sizeof(Control)) throw std::invalid_argument("pyshard._C.Mailbox: a block is too small");
  if (pids.size() != memories_.size()) throw std::invalid_argument("pyshard._C.Mailbox: one pid for each rank");
  for (const pid_t pid : pids) {
    const long fd = syscall(SYS_pidfd_open, pid, 0);
    if (fd < 0) {
      const std::string reason = std::strerror(errno);
      for (const int open : pidfds_) ::close(open);
      throw std::runtime_error("pidfd_open of process " + std::to_string(pid) + ": " + reason);
    }
    pidfds_.push_back(static_cast<int>(fd));
  }
}

void Mailbox::check_usable() const {
  if (getpid() != pid_)
    throw std::runtime_error("the transport belongs to process " + std::to_string(pid_) + ", and this is its child " +
                             std::to_string(getpid()) + ". Make a transport of its own in the child");
  if (closed_) throw std::runtime_error("the transport is closed. Make a new one");
  if (control(rank_).state.load(std::memory_order_relaxed) == kFailed)
    throw std::runtime_error("the transport was aborted here: " + message(rank_) + ". Make a new one");
}

std::optional<Trouble> Mailbox::exchange(std::string_view payload, std::string_view operation, double timeout,
                                         const std::vector<char*>& results) {
  check_usable();
  if (trouble_) return trouble_;
  control(rank_).operation.write(operation);
  try {
    return trouble_ = swap_payloads(payload, timeout, results);
  } catch (const Interrupt&) {
    // The others will complete this round without it.
    abort("interrupted by a signal in '" + std::string(operation) + "'");
    throw;
  }
}

std::optional<Trouble> Mailbox::swap_payloads(std::string_view payload, double timeout,
                                              const std::vector<char*>& results) {
  Control& own = control(rank_);
  size_t done = 0;
  do {
    const size_t piece = std::min(kAreaBytes, payload.size() - done);
    const uint64_t round = own.round.value.load(std::memory_order_relaxed) + 1;
    own.payload_bytes[round % 2].store(payload.size(), std::memory_order_relaxed);
    std::memcpy(own.areas[round % 2], payload.data() + done, piece);
    rounds_.advance(0);
    if (auto trouble = await(rounds_, 0, round, timeout)) return trouble;
    for (size_t rank = 0; rank < memories_.size(); ++rank) {
      if (control(rank).payload_bytes[round % 2].load(std::memory_order_relaxed) != payload.size())
        return Trouble{"length", rank, {}, rank};
      std::memcpy(results[rank] + done, control(rank).areas[round % 2], piece);
    }
    done += piece;
  } while (done < payload.size());
  return std::nullopt;
}

std::optional<Trouble> Mailbox::wait(const Counters& counters, size_t index, uint64_t target,
                                     std::string_view operation, double timeout) {
  check_usable();
  if (trouble_) return trouble_;
  control(rank_).operation.write(operation);
  return trouble_ = await(counters, index, target, timeout);
}

std::optional<Trouble> Mailbox::advance(Counters& counters, size_t index, std::string_view operation) {
  check_usable();
  if (trouble_) return trouble_;
  control(rank_).operation.write(operation);
  counters.advance(index);
  return std::nullopt;
}

std::optional<Trouble> Mailbox::await(const Counters& counters, size_t index, uint64_t target, double timeout) {
  if (counters.reached(index, target)) return std::nullopt;
  Control& own = control(rank_);
  own.waiting.store(1, std::memory_order_relaxed);
  struct Done {
    Control& own;
    ~Done() { own.waiting.store(0, std::memory_order_relaxed); }
  } done{own};

  const Clock::time_point start = Clock::now();
  const double longest = std::chrono::duration<double>(std::chrono::hours(24 * 365)).count();
  const Clock::time_point deadline =
      start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::min(timeout, longest)));
  Clock::time_point now = start, next_look = start + kLook, next_close_look = start + kLookClosely;
  microseconds nap = kShortNap;
  Interrupts interrupts(signalled_);

  std::optional<Trouble> trouble;
  while (!trouble) {
    if (spin_ && now - start < kSpin) {
      for (int i = 0; i < 16; ++i) pause();
    } else if (now - start < kYield) {
      sched_yield();
    } else {
      std::this_thread::sleep_for(nap);
      nap = std::min(2 * nap, kLongNap);
    }
    if (counters.reached(index, target)) return std::nullopt;
    now = Clock::now();
    if (now >= next_look) {
      const bool look_closely = now >= next_close_look;
      trouble = gone(look_closely);
      // The cause may have ended after the look at it, and before the look at its follower.
      if (trouble && trouble->kind == "blamed") trouble = gone(true);
      next_look = now + kLook;
      if (look_closely) next_close_look = now + kLookClosely;
      if (!trouble && now >= deadline) {
        trouble = Trouble{"late", 0, {}, 0};
        for (size_t rank = 0; rank < memories_.size(); ++rank)
          if (!counters.has_reached(rank, index, target)) trouble->late.push_back(rank);
        if (!trouble->late.empty()) trouble->rank = trouble->late[0];
      }
      if (closed_) check_usable();  // by another thread
      interrupts.look(now);
    }
  }
  // It may have arrived just before it went, or now.
  if (counters.reached(index, target)) return std::nullopt;
  own.blames.store(trouble->rank + 1, std::memory_order_release);
  return trouble;
}

// A rank that has ended because of another one is not the cause: first those that have ended of themselves.
std::optional<Trouble> Mailbox::gone(bool look_closely) const {
  std::vector<pollfd> polls;
  for (const int fd : pidfds_) polls.push_back({fd, POLLIN, 0});
  poll(polls.data(), polls.size(), 0);
  std::optional<Trouble> follower;
  for (size_t rank = 0; rank < memories_.size(); ++rank) {
    if (rank == rank_) continue;
    // In this order: what it has written before its end counts.
    const bool died = (polls[rank].revents & POLLIN) || (look_closely && is_ending(pids_[rank]));
    const uint32_t state = control(rank).state.load(std::memory_order_acquire);
    if (!died && state == kRunning) continue;
    const uint64_t blames = control(rank).blames.load(std::memory_order_acquire);
    if (blames == 0 || blames > memories_.size())
      return Trouble{state == kFailed ? "failed" : state == kLeft ? "left" : "died", rank, {}, rank};
    if (follower) continue;
    if (blames == rank_ + 1)
      follower = Trouble{"gave_up", rank, {}, rank};
    else
      follower = Trouble{"blamed", static_cast<size_t>(blames - 1), {}, rank};
  }
  return follower;
}

void Mailbox::abort(std::string_view message) {
  if (closed_ || getpid() != pid_) return;
  Control& own = control(rank_);
  if (own.state.load(std::memory_order_relaxed) != kRunning) return;
  own.message.write(message);
  own.state.store(kFailed, std::memory_order_release);
}

void Mailbox::close() {
  if (closed_.exchange(true)) return;
  Control& own = control(rank_);
  if (getpid() == pid_ && own.state.load(std::memory_order_relaxed) == kRunning)
    own.state.store(kLeft, std::memory_order_release);
  for (const int fd : pidfds_) ::close(fd);
}

std::string Mailbox::operation(size_t rank) const { return control(rank).operation.read(); }
bool Mailbox::waiting(size_t rank) const { return control(rank).waiting.load(std::memory_order_relaxed); }
std::string Mailbox::message(size_t rank) const { return control(rank).message.read(); }

}  // namespace pyshard
