// What the ranks of a host tell each other: small payloads, how far they are, what they do, and that they have failed.
//
// Each rank has one control block, which it alone writes and all ranks map. Whatever waits here looks at the peers every
// millisecond: a process descriptor (pidfd) tells of a process that has ended, also when nobody has reaped it, and the
// block of one that has failed or left. Now and then it looks for a process that is still ending.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "counters.h"

namespace pyshard {

// A short text that one process writes and others may read meanwhile; longer ones are cut.
class Note {
 public:
  void write(std::string_view text);
  std::string read() const;

 private:
  static constexpr size_t kWords = 62;
  std::atomic<uint32_t> version_;  // odd while it is being written
  std::atomic<uint32_t> bytes_;
  std::atomic<uint64_t> words_[kWords];
};

struct Control;

// Why a wait has ended without what it waited for.
struct Trouble {
  // died: the process has ended. failed: it has called abort(). left: it has called close(). blamed: another rank
  // (`witness`) has ended because of it. gave_up: it has ended because of this rank. late: the timeout has passed.
  // length: it has exchanged another number of bytes.
  std::string kind;
  size_t rank;
  std::vector<size_t> late;  // all of them, for kind late
  size_t witness;
};

class Mailbox {
 public:
  static constexpr size_t kTokenBytes = 64;  // at the start of a block; Python writes and compares it
  static size_t block_bytes();

  // `memories`: the control blocks of all ranks; `pids` their processes. Throws std::runtime_error if the system has no
  // process descriptors. All ranks must have come here before anything else is called: that proves that each descriptor
  // is of the rank and not of a later process with its number.
  Mailbox(std::vector<std::shared_ptr<SharedMemory>> memories, const std::vector<pid_t>& pids, size_t rank,
          bool (*signalled)());
  ~Mailbox() { close(); }
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;

  // Each of these says what this rank does. They throw std::runtime_error once the mailbox is closed or aborted, and in
  // a forked child, which shares the memory and must not write to it. The first trouble stays: this rank is out of step
  // with the others then. A timeout is in seconds.

  // Copies the payloads of all ranks, of one length, to results[rank]; also a barrier. An interrupt aborts.
  std::optional<Trouble> exchange(std::string_view payload, std::string_view operation, double timeout,
                                  const std::vector<char*>& results);
  // Waits until all ranks' counters have reached the target.
  std::optional<Trouble> wait(const Counters& counters, size_t index, uint64_t target, std::string_view operation,
                              double timeout);
  // Advances this rank's counter.
  std::optional<Trouble> advance(Counters& counters, size_t index, std::string_view operation);

  // Ends what the peers wait for, with a message. The first one counts; none does after close() or in a forked child.
  void abort(std::string_view message);
  void close();

  size_t world() const { return memories_.size(); }
  std::string operation(size_t rank) const;  // what it does or did last
  bool waiting(size_t rank) const;           // whether it waits in it
  std::string message(size_t rank) const;    // of its abort()

 private:
  Control& control(size_t rank) const { return *reinterpret_cast<Control*>(memories_[rank]->data()); }
  void check_usable() const;
  std::optional<Trouble> swap_payloads(std::string_view payload, double timeout, const std::vector<char*>& results);
  std::optional<Trouble> await(const Counters& counters, size_t index, uint64_t target, double timeout);
  std::optional<Trouble> gone(bool look_closely) const;

  std::vector<std::shared_ptr<SharedMemory>> memories_;
  size_t rank_;
  bool (*signalled_)();
  pid_t pid_;
  bool spin_;
  Counters rounds_;  // of exchange()
  std::vector<pid_t> pids_;
  std::vector<int> pidfds_;
  std::atomic<bool> closed_{false};
  std::optional<Trouble> trouble_;
};

}  // namespace pyshard
