// Where the time of steps goes, as the first thread sees it: products without, work by rows with the wait for other threads.
#pragma once

#include <cstdint>
#include <ctime>

namespace tandem {

class Phases {
   public:
    enum Phase { EMBED, NORM, QKV, TURN, ATTENTION, PREPARE, OUTPUT, GATE_UP, DOWN, HEAD, COUNT };

    void begin() { last_ = now(); }

    // The phase that ended is over; the next begins. Costs some 30 ns.
    void end(int thread, Phase phase) {
        if (thread) return;
        const int64_t at = now();
        nanoseconds_[phase] += at - last_;
        last_ = at;
    }

    // The sums since the last call.
    void take(int64_t* target) {
        for (int phase = 0; phase < COUNT; phase++) {
            target[phase] = nanoseconds_[phase];
            nanoseconds_[phase] = 0;
        }
    }

   private:
    static int64_t now() {
        timespec time;
        clock_gettime(CLOCK_MONOTONIC, &time);
        return int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
    }

    int64_t nanoseconds_[COUNT] = {};
    int64_t last_ = 0;
};

}  // namespace tandem
