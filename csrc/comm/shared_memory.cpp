#include "shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // in glibc's headers since 2.35
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U  // Linux 6.3, which may refuse memory without it
#endif

namespace pyshard {
namespace {

constexpr char kName[] = "pyshard";  // shown as /memfd:pyshard in /proc/<pid>/maps
// Work between two looks for signals: some 2 ms. A signal starts a piece again, so that it must be short.
constexpr size_t kPiece = size_t{8} << 20;

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

}  // namespace

SharedMemory::SharedMemory(size_t bytes, Interrupts interrupts) : bytes_(bytes) {
  fd_ = memfd_create(kName, MFD_CLOEXEC | MFD_NOEXEC_SEAL);
  if (fd_ < 0 && errno == EINVAL) fd_ = memfd_create(kName, MFD_CLOEXEC);
  if (fd_ < 0) fail("memfd_create");
  try {
    if (ftruncate(fd_, static_cast<off_t>(bytes))) fail("ftruncate to " + std::to_string(bytes) + " bytes");
    for (size_t begin = 0; begin < bytes; begin += kPiece) {
      const size_t piece = std::min(kPiece, bytes - begin);
      while (fallocate(fd_, 0, static_cast<off_t>(begin), static_cast<off_t>(piece))) {
        if (errno != EINTR) fail("fallocate at " + std::to_string(begin) + " of " + std::to_string(bytes) + " bytes");
        interrupts.look();
      }
      interrupts.look();
    }
    map();
  } catch (...) {
    close(fd_);
    throw;
  }
}

SharedMemory::SharedMemory(pid_t pid, int fd, size_t bytes) : bytes_(bytes) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
  // Where the number means another process, the file may be anything, and opening it could block or do harm.
  char target[64];
  const std::string expected = std::string("/memfd:") + kName + " (deleted)";
  const ssize_t length = readlink(path.c_str(), target, sizeof target);
  if (length < 0) fail(path);
  if (std::string(target, static_cast<size_t>(length)) != expected)
    throw std::runtime_error(path + " is " + std::string(target, static_cast<size_t>(length)) + ", not " + expected);
  fd_ = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd_ < 0) fail(path);
  try {
    struct stat status;
    if (fstat(fd_, &status)) fail(path);
    if (status.st_size != static_cast<off_t>(bytes))
      throw std::runtime_error(path + " has " + std::to_string(status.st_size) + " bytes, not " +
                               std::to_string(bytes));
    map();
  } catch (...) {
    close(fd_);
    throw;
  }
  seal_off();
}

// In a forked child as well: only the child's own map and descriptor go.
SharedMemory::~SharedMemory() {
  munmap(data_, bytes_);
  seal_off();
}

void SharedMemory::map() {
  void* address = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
  if (address == MAP_FAILED) fail("mmap of " + std::to_string(bytes_) + " bytes");
  data_ = static_cast<char*>(address);
}

void SharedMemory::seal_off() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

void SharedMemory::populate(Interrupts interrupts) {
  for (size_t begin = 0; begin < bytes_; begin += kPiece) {
    const size_t piece = std::min(kPiece, bytes_ - begin);
    while (madvise(data_ + begin, piece, MADV_POPULATE_WRITE)) {
      if (errno == EINVAL) return;
      if (errno != EINTR && errno != EAGAIN) fail("madvise at " + std::to_string(begin) + " bytes");
      interrupts.look();
    }
    interrupts.look();
  }
}

}  // namespace pyshard
