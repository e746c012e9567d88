// What test_threads.py runs: parallel_for as builds without OpenMP have it. Prints nothing and returns 0 if all is well.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#define PYFUSED_ISA baseline
#include "cpu/parallel.h"

using pyfused::baseline::parallel_for;

namespace {

void check(bool good, const char* what) {
  if (good) return;
  std::printf("%s\n", what);
  std::exit(1);
}

// Every number of [0, count) is visited once, by the threads [0, parts).
void visit(int64_t count, int threads) {
  std::vector<int> visits(count), of_thread(threads);
  parallel_for(count, 1, threads, [&](int64_t begin, int64_t end, int thread) {
    ++of_thread[thread];
    for (int64_t i = begin; i < end; ++i) ++visits[i];
  });
  for (int v : visits) check(v == 1, "a number was not visited once");
  for (int t = 0; t < threads; ++t) check(of_thread[t] == (t < count), "a part did not run once");
}

}  // namespace

int main(int, char** arguments) {
  const bool fork_too = !std::strcmp(arguments[1], "fork");
  for (int round = 0; round < 3000; ++round) visit(1 + round % 40, 1 + round % 7);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // they sleep by now
  visit(100, 7);

  std::atomic<int> together{0};  // that is, on threads: each waits for the others
  parallel_for(3, 1, 3, [&](int64_t, int64_t, int) {
    for (++together; together < 3;) std::this_thread::yield();
  });

  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c)
    callers.emplace_back([] {
      for (int round = 0; round < 500; ++round) visit(17, 4);
    });
  for (auto& caller : callers) caller.join();

  std::atomic<int> inner{0};
  parallel_for(4, 1, 4, [&](int64_t, int64_t, int) {
    parallel_for(5, 1, 5, [&](int64_t begin, int64_t end, int) { inner += static_cast<int>(end - begin); });
  });
  check(inner == 20, "parallel_for within parallel_for");

  if (fork_too) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(10);
      visit(100, 4);
      std::_Exit(0);
    }
    int status = 0;
    check(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child");
    visit(100, 4);
  }
  return 0;
}
