#include "cpu/threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace pyfused {
namespace {

// How long a thread that waits looks again and again before it sleeps, or lets others run: between two kernels of a
// model there is hardly more, and waking up takes time.
constexpr std::chrono::microseconds kPatience(50);

template <class Done>
bool comes_soon(const Done& done) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  do {
    for (int i = 0; i < 100; ++i)
      if (done()) return true;
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

struct Worker {
  std::atomic<uint64_t> jobs{0};  // given to it so far
  std::mutex mutex;               // under which a sleeper looks at `jobs`
  std::condition_variable wake;
};

struct Pool {
  std::atomic_flag taken = ATOMIC_FLAG_INIT;
  std::deque<Worker> workers;
  // The job: written while no worker has one.
  void (*run)(const void*, int) = nullptr;
  const void* body = nullptr;
  std::atomic<int> unfinished{0};

  void work(Worker& self, int part) {
    for (uint64_t done = 0;; ++done) {
      auto given = [&] { return self.jobs.load(std::memory_order_acquire) != done; };
      if (!comes_soon(given)) {
        std::unique_lock<std::mutex> lock(self.mutex);
        self.wake.wait(lock, given);
      }
      run(body, part);
      unfinished.fetch_sub(1, std::memory_order_release);
    }
  }

  // Gives the parts 1, 2, ... to as many workers; returns the first part that there is no thread for.
  int start(int parts) {
    try {
      while (static_cast<int>(workers.size()) < parts - 1) {
        const int part = static_cast<int>(workers.size()) + 1;
        Worker& worker = workers.emplace_back();
        std::thread(&Pool::work, this, std::ref(worker), part).detach();
      }
    } catch (const std::system_error&) {
      workers.pop_back();
    }
    const int count = std::min(parts - 1, static_cast<int>(workers.size()));
    unfinished.store(count, std::memory_order_relaxed);
    for (int i = 0; i < count; ++i) {
      {
        std::lock_guard<std::mutex> lock(workers[i].mutex);
        workers[i].jobs.fetch_add(1, std::memory_order_release);
      }
      workers[i].wake.notify_one();
    }
    return count + 1;
  }
};

std::atomic<Pool*> pool{nullptr};

Pool& this_process_pool() {
  static std::mutex making;
  if (Pool* made = pool.load(std::memory_order_acquire)) return *made;
  std::lock_guard<std::mutex> lock(making);
  if (!pool.load()) {
#if !defined(_WIN32)
    // A child has none of its parent's threads, and gets a pool of its own.
    static const int once = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    (void)once;
#endif
    pool.store(new Pool, std::memory_order_release);  // never deleted: its threads live until the process ends
  }
  return *pool.load();
}

}  // namespace

void run_on_threads(int parts, void (*run)(const void* body, int part), const void* body) {
  Pool& threads = this_process_pool();
  const bool mine = !threads.taken.test_and_set(std::memory_order_acquire);
  int left = 1;
  if (mine) {
    threads.run = run;
    threads.body = body;
    left = threads.start(parts);
  }
  run(body, 0);
  for (int part = left; part < parts; ++part) run(body, part);
  if (!mine) return;
  auto finished = [&] { return threads.unfinished.load(std::memory_order_acquire) == 0; };
  if (!comes_soon(finished))
    while (!finished()) std::this_thread::yield();
  threads.taken.clear(std::memory_order_release);
}

}  // namespace pyfused
