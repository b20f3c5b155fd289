// Memory that several processes of one host map. It is an anonymous file (memfd), which peers open through
// /proc/<pid>/fd while its owner keeps the descriptor open. So it has no name in any file system, no mount limits its
// size, and it is gone with the last process that maps it, however that ends.
#pragma once

#include <sys/types.h>

#include <cstddef>

#include "interrupts.h"

namespace pyshard {

class SharedMemory {
 public:
  // New memory, all zeros. Its pages are taken from the system here: later there would be no error for a lack of
  // them, only a signal. Throws std::runtime_error with the system's reason.
  SharedMemory(size_t bytes, Interrupts interrupts);
  // The memory that a peer has created with as many bytes. Throws std::runtime_error if it is not there.
  SharedMemory(pid_t pid, int fd, size_t bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  int fd() const { return fd_; }  // -1 for a peer's, and once sealed off
  // Closes the descriptor: whoever maps it has done so.
  void seal_off();
  // Clears and maps every page now (0.25 s for 1 GiB), so that the first step does not pay for it. Does nothing before
  // Linux 5.14.
  void populate(Interrupts interrupts);

 private:
  void map();

  char* data_ = nullptr;
  size_t bytes_;
  int fd_;
};

}  // namespace pyshard
