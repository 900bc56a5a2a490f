// Workers on the same cores see how many of them compute just now, and each takes its share of the cores.
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
#include <string>

#include "team.h"

namespace tandem {

constexpr int SEATS = 16;
constexpr int64_t GOES_ON = 5000000;  // nanoseconds after a step in which the next one mostly begins

// Lies in memory that the processes share. Who computes holds one; the kernel frees those of a process that ends.
struct SeatMap {
    pthread_mutex_t seats[SEATS];
    std::atomic<int64_t> until[SEATS];  // on the monotonic clock: whoever left the seat may come back by then
};

// Only speed depends on it.
class Seats {
   public:
    // `path` begins the name of the shared memory, which ends in its size, since other versions of this code may run beside; it is made
    // if it is not there. `shared()` is false if it could not be.
    explicit Seats(const std::string& path) {
        const int file = open_whole(path + "-" + std::to_string(sizeof(SeatMap)));
        if (file < 0) return;
        void* memory = ours(file) ? mmap(nullptr, sizeof(SeatMap), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED;
        close(file);
        if (memory != MAP_FAILED) map_ = static_cast<SeatMap*>(memory);
    }

    ~Seats() {
        if (map_) munmap(map_, sizeof(SeatMap));
    }

    Seats(const Seats&) = delete;
    Seats& operator=(const Seats&) = delete;

    bool shared() const { return map_ != nullptr; }

    // A seat, the last one if it is free, to be left by the thread that took it; -1 if there is none: nobody knows then that we compute.
    int take() {
        for (int tried = 0; tried < SEATS; tried++) {
            const int seat = (last_ + tried) % SEATS;
            if (lock(map_->seats[seat])) return last_ = seat;
        }
        return -1;
    }

    void leave(int seat) {
        map_->until[seat].store(nanoseconds(CLOCK_MONOTONIC) + GOES_ON, std::memory_order_relaxed);
        pthread_mutex_unlock(&map_->seats[seat]);
    }

    // How many compute beside us, or are between two steps. Two that count at once may each see one too many, until they count again.
    int others(int mine) {
        const int64_t now = nanoseconds(CLOCK_MONOTONIC);
        int count = 0;
        for (int seat = 0; seat < SEATS; seat++)
            if (seat != mine && (now < map_->until[seat].load(std::memory_order_relaxed) || held(map_->seats[seat]))) count++;
        return count;
    }

   private:
    static bool held(pthread_mutex_t& mutex) {
        if (!lock(mutex)) return true;
        pthread_mutex_unlock(&mutex);
        return false;
    }

    static bool lock(pthread_mutex_t& mutex) {
        const int result = pthread_mutex_trylock(&mutex);
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

    // Others may make files in that folder, too.
    static bool ours(int file) {
        struct stat status;
        return !fstat(file, &status) && status.st_uid == geteuid() && status.st_size == sizeof(SeatMap);
    }

    static bool initialise(int file) {
        if (ftruncate(file, sizeof(SeatMap))) return false;
        void* memory = mmap(nullptr, sizeof(SeatMap), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (memory == MAP_FAILED) return false;
        pthread_mutexattr_t attributes;
        pthread_mutexattr_init(&attributes);
        pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
        pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
        bool made = true;
        for (auto& seat : static_cast<SeatMap*>(memory)->seats) made = !pthread_mutex_init(&seat, &attributes) && made;
        pthread_mutexattr_destroy(&attributes);
        munmap(memory, sizeof(SeatMap));
        return made;
    }

    SeatMap* map_ = nullptr;
    int last_ = 0;
};

}  // namespace tandem
