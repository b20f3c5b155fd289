// Preloaded into a process that saves a checkpoint: counts the calls that change files below a directory, and kills
// the process at one of them, before the call or in the middle of a write.
//
// Built by test_checkpoint_kills.py:  g++ -shared -fPIC -O1 checkpoint_kills.cpp -ldl

#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

namespace {

char root[4096];
long calls = 0;
long last = -1;  // the call at which the process ends; -1: none
bool torn = false;
int log_to = -1;

template <class F>
F real(const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

void die() {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

bool below(const char* path) {
  size_t n = strlen(root);
  return n && strncmp(path, root, n) == 0 && (path[n] == '/' || path[n] == 0);
}

// The absolute path of what a call names; empty if that is not known.
struct Path {
  char text[8192] = "";

  Path(int directory, const char* name) {
    if (name[0] == '/') {
      snprintf(text, sizeof text, "%s", name);
      return;
    }
    char where[4096] = "";
    if (directory == AT_FDCWD) {
      if (!getcwd(where, sizeof where)) return;
    } else {
      resolve(directory, where, sizeof where);
    }
    snprintf(text, sizeof text, "%s/%s", where, name);
  }

  explicit Path(int descriptor) { resolve(descriptor, text, sizeof text); }

  static void resolve(int descriptor, char* out, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t n = readlink(link, out, size - 1);
    out[n < 0 ? 0 : n] = 0;
  }
};

// Counts a call; true if it is to be a write of which a half happens.
bool count(const char* name, const Path& path, const char* to = "", bool writes = false) {
  if (!below(path.text)) return false;
  ++calls;
  if (log_to >= 0) {
    char line[20000];
    int n = snprintf(line, sizeof line, "%s\t%s\t%s\n", name, path.text, to);
    syscall(SYS_write, log_to, line, n);
  }
  if (calls != last) return false;
  if (writes && torn) return true;
  die();
  return false;
}

}  // namespace

extern "C" {

// From now on counts calls below `directory`, and dies at call number `at`.
void kills_arm(const char* directory, long at, int half, int log) {
  snprintf(root, sizeof root, "%s", directory);
  calls = 0;
  last = at;
  torn = half;
  log_to = log;
}

long kills_calls() { return calls; }

#define MODE_OF(flags)           \
  mode_t mode = 0;               \
  if (flags & O_CREAT) {         \
    va_list rest;                \
    va_start(rest, flags);       \
    mode = va_arg(rest, mode_t); \
    va_end(rest);                \
  }

int open(const char* name, int flags, ...) {
  MODE_OF(flags);
  if (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) count("open", Path(AT_FDCWD, name));
  return real<int (*)(const char*, int, ...)>("open")(name, flags, mode);
}

int openat(int directory, const char* name, int flags, ...) {
  MODE_OF(flags);
  if (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) count("open", Path(directory, name));
  return real<int (*)(int, const char*, int, ...)>("openat")(directory, name, flags, mode);
}

int open64(const char* name, int flags, ...) {
  MODE_OF(flags);
  return open(name, flags, mode);
}

int openat64(int directory, const char* name, int flags, ...) {
  MODE_OF(flags);
  return openat(directory, name, flags, mode);
}

ssize_t write(int descriptor, const void* data, size_t size) {
  auto next = real<ssize_t (*)(int, const void*, size_t)>("write");
  if (root[0] && count("write", Path(descriptor), "", true)) {
    next(descriptor, data, size / 2);
    die();
  }
  return next(descriptor, data, size);
}

ssize_t pwrite64(int descriptor, const void* data, size_t size, off64_t at) {
  if (root[0]) count("write", Path(descriptor));
  return real<ssize_t (*)(int, const void*, size_t, off64_t)>("pwrite64")(descriptor, data, size, at);
}

int fsync(int descriptor) {
  count("fsync", Path(descriptor));
  return real<int (*)(int)>("fsync")(descriptor);
}

int fdatasync(int descriptor) {
  count("fsync", Path(descriptor));
  return real<int (*)(int)>("fdatasync")(descriptor);
}

int ftruncate64(int descriptor, off64_t size) {
  count("truncate", Path(descriptor));
  return real<int (*)(int, off64_t)>("ftruncate64")(descriptor, size);
}

int rename(const char* from, const char* to) {
  count("rename", Path(AT_FDCWD, from), to);
  return real<int (*)(const char*, const char*)>("rename")(from, to);
}

int renameat(int a, const char* from, int b, const char* to) {
  count("rename", Path(a, from), to);
  return real<int (*)(int, const char*, int, const char*)>("renameat")(a, from, b, to);
}

int mkdir(const char* name, mode_t mode) {
  count("mkdir", Path(AT_FDCWD, name));
  return real<int (*)(const char*, mode_t)>("mkdir")(name, mode);
}

int mkdirat(int directory, const char* name, mode_t mode) {
  count("mkdir", Path(directory, name));
  return real<int (*)(int, const char*, mode_t)>("mkdirat")(directory, name, mode);
}

int unlink(const char* name) {
  count("unlink", Path(AT_FDCWD, name));
  return real<int (*)(const char*)>("unlink")(name);
}

int unlinkat(int directory, const char* name, int flags) {
  count(flags & AT_REMOVEDIR ? "rmdir" : "unlink", Path(directory, name));
  return real<int (*)(int, const char*, int)>("unlinkat")(directory, name, flags);
}

int rmdir(const char* name) {
  count("rmdir", Path(AT_FDCWD, name));
  return real<int (*)(const char*)>("rmdir")(name);
}

}  // extern "C"
