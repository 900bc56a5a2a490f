// The threads of one engine. They meet at barriers within a step, and sleep between steps.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tandem {

// How long to look before giving the core away: some 10 microseconds at a barrier, 100 between steps. Other workers may share the cores.
constexpr int BARRIER_SPINS = 400;
constexpr int IDLE_SPINS = 4000;

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

class Team {
   public:
    // The caller of `run` is one of the threads.
    explicit Team(int size) : size_(size) {
        for (int index = 1; index < size; index++) threads_.emplace_back([this, index] { serve(index); });
    }

    ~Team() {
        ending_ = true;
        announce();
        for (auto& thread : threads_) thread.join();
    }

    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // Calls work(index) for every index below `count`, each on a thread of its own; returns when all have ended.
    void run(int count, const std::function<void(int)>& work) {
        active_ = std::max(1, std::min(count, size_));
        work_ = &work;
        next_ = 0;
        if (active_ == 1) return work(0);
        running_.store(size_ - 1, std::memory_order_relaxed);
        announce();
        work(0);
        wait([this] { return running_.load(std::memory_order_acquire) == 0; });
    }

    int active() const { return active_; }

    // Within `run`: waits until all active threads have come here. Counting of tasks then begins anew.
    void meet() {
        if (active_ == 1) {
            next_.store(0, std::memory_order_relaxed);
            return;
        }
        uint32_t generation = generation_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == active_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            generation_.store(generation + 1, std::memory_order_release);
        } else {
            wait([&] { return generation_.load(std::memory_order_acquire) != generation; });
        }
    }

    // Within `run`, between two barriers: the next task that nobody has taken.
    int take() { return next_.fetch_add(1, std::memory_order_relaxed); }

    // How often a thread gave its core away at a barrier since the last call: many mean that another process has one of our cores.
    int64_t take_yields() { return yields_.exchange(0, std::memory_order_relaxed); }

   private:
    template <class Done>
    void wait(Done done) {
        for (int spins = 0; !done(); spins++) {
            if (spins < BARRIER_SPINS) {
                relax();
            } else {
                yields_.fetch_add(1, std::memory_order_relaxed);
                sched_yield();
            }
        }
    }

    void announce() {
        round_.fetch_add(1, std::memory_order_release);
        round_.notify_all();
    }

    void serve(int index) {
        for (uint32_t seen = 0;; seen++) {
            for (int spins = 0; round_.load(std::memory_order_acquire) == seen; spins++) {
                if (spins < IDLE_SPINS) {
                    relax();
                } else {
                    round_.wait(seen, std::memory_order_acquire);
                }
            }
            if (ending_) return;
            if (index < active_) (*work_)(index);
            running_.fetch_sub(1, std::memory_order_release);
        }
    }

    const int size_;
    int active_ = 1;
    const std::function<void(int)>* work_ = nullptr;
    std::atomic<bool> ending_{false};
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<int> running_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
    alignas(64) std::atomic<int> next_{0};
    alignas(64) std::atomic<int64_t> yields_{0};
    std::vector<std::thread> threads_;
};

}  // namespace tandem
