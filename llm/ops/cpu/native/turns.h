// Workers on the same cores compute in turns: two teams at once would wait at every barrier for the scheduler.
#pragma once

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <string>

namespace tandem {

#ifdef __GLIBC_PREREQ
#if __GLIBC_PREREQ(2, 30)
#define TANDEM_HAS_CLOCKLOCK
#endif
#endif

// By the wall clock, whose steps end a wait at once or make it last for hours, only where the C library has nothing else.
#ifdef TANDEM_HAS_CLOCKLOCK
constexpr clockid_t TURN_CLOCK = CLOCK_MONOTONIC;
inline int lock_until(pthread_mutex_t& mutex, const timespec& until) { return pthread_mutex_clocklock(&mutex, TURN_CLOCK, &until); }
#else
constexpr clockid_t TURN_CLOCK = CLOCK_REALTIME;
inline int lock_until(pthread_mutex_t& mutex, const timespec& until) { return pthread_mutex_timedlock(&mutex, &until); }
#endif

// Lies in memory that the processes share. `queue` is held while waiting for `cores`, so that who comes first goes first, and who
// gave the cores away cannot have them back before those who wait. Locks of a process that ends are freed by the kernel.
struct Turnstile {
    pthread_mutex_t queue;
    pthread_mutex_t cores;
    std::atomic<int32_t> waiting;  // set by who holds `queue`
};

// Only speed depends on it: whoever waits longer than a limit computes anyway, since the other may be stopped.
class Turns {
   public:
    // `path` names the shared memory; it is made if it is not there. `shared()` is false if it could not be.
    explicit Turns(const std::string& path) {
        const int file = open_whole(path);
        if (file < 0) return;
        void* memory = ours(file) ? mmap(nullptr, sizeof(Turnstile), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED;
        close(file);
        if (memory != MAP_FAILED) turnstile_ = static_cast<Turnstile*>(memory);
    }

    ~Turns() {
        if (turnstile_) munmap(turnstile_, sizeof(Turnstile));
    }

    Turns(const Turns&) = delete;
    Turns& operator=(const Turns&) = delete;

    bool shared() const { return turnstile_ != nullptr; }

    // Whether another process waits for its turn.
    bool wanted() const { return turnstile_->waiting.load(std::memory_order_relaxed) > 0; }

    // Returns whether it is our turn now: false after `limit_ms`. A turn is given back by the thread that took it.
    bool take(int limit_ms) {
        timespec until;
        clock_gettime(TURN_CLOCK, &until);
        until.tv_sec += (until.tv_nsec / 1000000 + limit_ms) / 1000;
        until.tv_nsec = (until.tv_nsec / 1000000 + limit_ms) % 1000 * 1000000;
        if (!lock(turnstile_->queue, until)) return false;
        turnstile_->waiting.store(1, std::memory_order_relaxed);
        const bool mine = lock(turnstile_->cores, until);
        turnstile_->waiting.store(0, std::memory_order_relaxed);
        pthread_mutex_unlock(&turnstile_->queue);
        return mine;
    }

    void give() { pthread_mutex_unlock(&turnstile_->cores); }

   private:
    static bool lock(pthread_mutex_t& mutex, const timespec& until) {
        const int result = lock_until(mutex, until);
        if (result == EOWNERDEAD) pthread_mutex_consistent(&mutex);
        return result == 0 || result == EOWNERDEAD;
    }

    // Made under another name first, so that nobody sees half of it.
    static int open_whole(const std::string& path) {
        const std::string made = path + "." + std::to_string(getpid());
        const int file = open(made.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (file >= 0) {
            if (initialise(file)) (void)!link(made.c_str(), path.c_str());
            close(file);
            unlink(made.c_str());
        }
        return open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    }

    // Others may make files in that folder, too, and another version of this code a shorter one.
    static bool ours(int file) {
        struct stat status;
        return !fstat(file, &status) && status.st_uid == geteuid() && status.st_size == sizeof(Turnstile);
    }

    static bool initialise(int file) {
        if (ftruncate(file, sizeof(Turnstile))) return false;
        void* memory = mmap(nullptr, sizeof(Turnstile), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (memory == MAP_FAILED) return false;
        auto* turnstile = static_cast<Turnstile*>(memory);
        pthread_mutexattr_t attributes;
        pthread_mutexattr_init(&attributes);
        pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
        pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
        const bool made = !pthread_mutex_init(&turnstile->queue, &attributes) && !pthread_mutex_init(&turnstile->cores, &attributes);
        pthread_mutexattr_destroy(&attributes);
        munmap(memory, sizeof(Turnstile));
        return made;
    }

    Turnstile* turnstile_ = nullptr;
};

}  // namespace tandem
