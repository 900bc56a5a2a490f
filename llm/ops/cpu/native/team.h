// The threads of one engine. They meet at barriers within a piece of work, and sleep when there is none.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <ctime>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tandem {

// How long to look before sleeping: some 40 microseconds at a barrier, 100 between pieces of work.
constexpr int BARRIER_SPINS = 1500;
constexpr int IDLE_SPINS = 4000;

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

inline int64_t nanoseconds(clockid_t clock) {
    timespec time;
    clock_gettime(clock, &time);
    return int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
}

// Learns whether other programs want the cores. One thread alone is then faster than several that wait for each other at every
// barrier, since each of them may have to wait for the scheduler. Results do not depend on it: sums are never split between threads.
class Crowd {
   public:
    // How many of `most` threads to use now.
    int threads(int most, int64_t now) const { return now < alone_until_ ? 1 : most; }

    // After work of several threads: what it took, and how long threads that had work were kept from it.
    void observe(int64_t wall, int64_t stolen, int64_t now) {
        wall_ += wall;
        stolen_ += stolen;
        if (wall_ < ENOUGH) return;
        if (stolen_ > wall_ * MOST_STOLEN) {
            alone_until_ = now + patience_;
            patience_ = std::min(2 * patience_, LONGEST_ALONE);
        } else {
            patience_ = SHORTEST_ALONE;
        }
        wall_ = stolen_ = 0;
    }

   private:
    static constexpr int64_t MILLISECOND = 1000000;
    static constexpr int64_t ENOUGH = 2 * MILLISECOND, SHORTEST_ALONE = 50 * MILLISECOND, LONGEST_ALONE = 800 * MILLISECOND;
    static constexpr double MOST_STOLEN = 0.3;

    int64_t wall_ = 0, stolen_ = 0, alone_until_ = 0, patience_ = SHORTEST_ALONE;
};

class Team {
   public:
    // The caller of `run` is one of the threads.
    explicit Team(int size) : size_(size), seats_(new Seat[size]) {
        try {
            for (int index = 1; index < size; index++) threads_.emplace_back([this, index] { serve(index); });
        } catch (...) {  // there is no destructor to come that would end those made so far
            end();
            throw;
        }
    }

    ~Team() { end(); }

    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // Of those that there are: how many threads `run` takes at most from now on.
    void use(int threads) { used_ = std::clamp(threads, 1, size_); }

    // Calls work(index) for every index below the number of threads, each on a thread of its own; returns when all have ended.
    void run(const std::function<void(int)>& work) {
        const int64_t began = nanoseconds(CLOCK_MONOTONIC);
        active_ = crowd_.threads(used_, began);
        work_ = &work;
        next_.store(0, std::memory_order_relaxed);
        if (active_ == 1) return work(0);
        running_.store(active_ - 1, std::memory_order_relaxed);
        stolen_.store(0, std::memory_order_relaxed);
        for (int index = 1; index < active_; index++) call(seats_[index]);
        work_timed(0);
        wait(running_, [](int running) { return running == 0; }, seats_[0]);
        const int64_t ended = nanoseconds(CLOCK_MONOTONIC);
        crowd_.observe(ended - began, stolen_.load(std::memory_order_relaxed), ended);
    }

    int active() const { return active_; }

    // Within `run`: waits until all active threads have come here; the last to come does `between` before any goes on, so that work
    // too small to share costs no barrier of its own. Counting of tasks then begins anew.
    template <class Between>
    void meet(int index, Between between) {
        if (active_ == 1) {
            between();
            return next_.store(0, std::memory_order_relaxed);
        }
        const uint32_t generation = generation_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == active_) {
            between();
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            generation_.store(generation + 1, std::memory_order_release);
            generation_.notify_all();
        } else {
            wait(generation_, [generation](uint32_t now) { return now != generation; }, seats_[index]);
        }
    }

    void meet(int index) {
        meet(index, [] {});
    }

    // Within `run`, between two barriers: the next task that nobody has taken.
    int take() { return next_.fetch_add(1, std::memory_order_relaxed); }

   private:
    // Of one thread, on a line of its own.
    struct alignas(64) Seat {
        std::atomic<uint32_t> calls{0};
        int64_t slept = 0;
    };

    void end() {
        ending_ = true;
        for (int index = 1; index < size_; index++) call(seats_[index]);
        for (auto& thread : threads_) thread.join();
    }

    static void call(Seat& seat) {
        seat.calls.fetch_add(1, std::memory_order_release);
        seat.calls.notify_one();
    }

    template <class Value, class Done>
    static void wait(std::atomic<Value>& value, Done done, Seat& seat) {
        for (int spins = 0; spins < BARRIER_SPINS; spins++) {
            if (done(value.load(std::memory_order_acquire))) return;
            relax();
        }
        const int64_t began = nanoseconds(CLOCK_MONOTONIC);
        for (Value now = value.load(std::memory_order_acquire); !done(now); now = value.load(std::memory_order_acquire))
            value.wait(now, std::memory_order_acquire);
        seat.slept += nanoseconds(CLOCK_MONOTONIC) - began;
    }

    // Counts the time in which this thread neither ran nor slept: it was ready, and another program had the core.
    void work_timed(int index) {
        Seat& seat = seats_[index];
        seat.slept = 0;
        const int64_t wall = nanoseconds(CLOCK_MONOTONIC), own = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
        (*work_)(index);
        const int64_t passed = nanoseconds(CLOCK_MONOTONIC) - wall, ran = nanoseconds(CLOCK_THREAD_CPUTIME_ID) - own;
        stolen_.fetch_add(std::max<int64_t>(0, passed - ran - seat.slept), std::memory_order_relaxed);
    }

    void serve(int index) {
        Seat& seat = seats_[index];
        for (uint32_t seen = 0;; seen++) {
            for (int spins = 0; spins < IDLE_SPINS && seat.calls.load(std::memory_order_acquire) == seen; spins++) relax();
            seat.calls.wait(seen, std::memory_order_acquire);
            if (ending_) return;
            work_timed(index);
            running_.fetch_sub(1, std::memory_order_release);
            running_.notify_one();
        }
    }

    const int size_;
    int used_ = size_, active_ = 1;
    const std::function<void(int)>* work_ = nullptr;
    std::unique_ptr<Seat[]> seats_;
    Crowd crowd_;
    std::atomic<bool> ending_{false};
    alignas(64) std::atomic<int> running_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
    alignas(64) std::atomic<int> next_{0};
    alignas(64) std::atomic<int64_t> stolen_{0};
    std::vector<std::thread> threads_;
};

}  // namespace tandem
