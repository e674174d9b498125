#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace msp {
namespace {

// How long a thread waits actively for work, or for the end of it, before it sleeps. To wake a thread takes
// up to a tenth of a millisecond, as long as a small product, and while a model decodes the next product
// follows soon.
constexpr std::chrono::microseconds kLookOut{100};

template <class Ready>
bool look_out(const Ready& ready) {
    const auto until = std::chrono::steady_clock::now() + kLookOut;
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
#if defined(MSP_X86)
            __builtin_ia32_pause();
#endif
        }
    } while (std::chrono::steady_clock::now() < until);
    return false;
}

struct Job {
    Job(const std::function<void(int64_t, int64_t)>& body, int64_t count, int64_t grain, int64_t ranges)
        : body(body), count(count), grain(grain), ranges(ranges) {}

    const std::function<void(int64_t, int64_t)>& body;
    const int64_t count;
    const int64_t grain;
    const int64_t ranges;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    std::atomic<int64_t> done{0};

    // `body` is alive while a range is unfinished, since its owner waits for every range; it is not used
    // afterwards.
    void take_part() {
        int64_t finished = 0;
        for (int64_t range; (range = next.fetch_add(1, std::memory_order_relaxed)) < ranges; ++finished) {
            body(range * grain, std::min(count, (range + 1) * grain));
        }
        if (finished == 0) return;
        if (done.fetch_add(finished, std::memory_order_acq_rel) + finished < ranges) return;
        // under the lock, or the owner could check first and then sleep through this
        std::lock_guard<std::mutex> lock(mutex);
        all_done.notify_all();
    }

    void wait() {
        const auto finished = [this] { return done.load(std::memory_order_acquire) == ranges; };
        if (look_out(finished)) return;
        std::unique_lock<std::mutex> lock(mutex);
        all_done.wait(lock, finished);
    }
};

class Pool {
  public:
    // Asks `helpers` threads to join the job. A thread that comes late finds no range and goes back to sleep,
    // so a short loop never waits for a thread to wake up.
    void offer(const std::shared_ptr<Job>& job, int helpers) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (int i = 0; i < helpers; ++i) invitations_.push_back(job);
            invited_.store(invitations_.size(), std::memory_order_release);
            while (threads_ < std::min<int64_t>(kMaxThreads, static_cast<int64_t>(invitations_.size()))) {
                try {
                    std::thread([this] { serve(); }).detach();
                } catch (const std::system_error&) {
                    break;  // out of threads: those that exist, at least the caller, do the work
                }
                ++threads_;
            }
        }
        for (int i = 0; i < helpers; ++i) wake_.notify_one();
    }

    // The job is finished: invitations that no thread has taken are void.
    void withdraw(const std::shared_ptr<Job>& job) {
        std::lock_guard<std::mutex> lock(mutex_);
        invitations_.erase(std::remove(invitations_.begin(), invitations_.end(), job), invitations_.end());
        invited_.store(invitations_.size(), std::memory_order_release);
    }

  private:
    static constexpr int64_t kMaxThreads = 1024;

    void serve() {
        for (;;) {
            std::shared_ptr<Job> job;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [this] { return !invitations_.empty(); });
                job = std::move(invitations_.front());
                invitations_.pop_front();
                invited_.store(invitations_.size(), std::memory_order_release);
            }
            job->take_part();
            job.reset();
            look_out([this] { return invited_.load(std::memory_order_acquire) != 0; });
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<std::shared_ptr<Job>> invitations_;
    std::atomic<size_t> invited_{0};
    int64_t threads_ = 0;
};

// Never destroyed: its threads sleep until the process ends. A child after fork has none of them and may have
// inherited a locked mutex, so it starts with a new pool and leaves the old one alone.
std::atomic<Pool*> pool_of_process{nullptr};

Pool& pool() {
    Pool* current = pool_of_process.load(std::memory_order_acquire);
    if (current == nullptr) {
        static const int registered = pthread_atfork(
            nullptr, nullptr, [] { pool_of_process.store(nullptr, std::memory_order_release); });
        (void)registered;
        auto fresh = std::make_unique<Pool>();
        if (pool_of_process.compare_exchange_strong(current, fresh.get(), std::memory_order_acq_rel)) {
            current = fresh.release();
        }
    }
    return *current;
}

// The OpenMP runtime of torch, if torch is loaded: its threads are active between torch's own loops. With two
// pools on the same cores, each would wait until the other's threads sleep.
using OpenMpParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// It does not survive a fork, so a child uses the pool above.
OpenMpParallel open_mp() {
    static std::atomic<bool> forked{false};
    static const auto found = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    static const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
    (void)registered;
    return forked.load(std::memory_order_relaxed) ? nullptr : found;
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int threads,
                  const std::function<void(int64_t begin, int64_t end)>& body) {
    if (count <= 0) return;
    grain = std::max<int64_t>(1, grain);
    const int64_t ranges = (count + grain - 1) / grain;
    const int64_t helpers = std::min<int64_t>(threads, ranges) - 1;
    if (helpers <= 0) {
        body(0, count);
        return;
    }
    if (const OpenMpParallel parallel = open_mp()) {
        Job job(body, count, grain, ranges);
        parallel([](void* data) { static_cast<Job*>(data)->take_part(); }, &job,
                 static_cast<unsigned>(helpers + 1), 0);
        return;
    }
    const auto job = std::make_shared<Job>(body, count, grain, ranges);
    Pool& helpers_pool = pool();
    helpers_pool.offer(job, static_cast<int>(helpers));
    job->take_part();
    job->wait();
    helpers_pool.withdraw(job);
}

}  // namespace msp
