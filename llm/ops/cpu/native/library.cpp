// What Python calls, through ctypes. Every call runs without Python's lock.

#include <exception>

#include "step.h"

using tandem::Batch;
using tandem::Model;
using tandem::Pool;
using tandem::Step;

namespace {

// 0, or -1 if memory ran out.
template <class Work>
int guarded(Work work) {
    try {
        work();
        return 0;
    } catch (const std::exception&) {
        return -1;
    }
}

}  // namespace

extern "C" {

// Null if threads or memory cannot be had. The model's memory stays the caller's, and must outlive the step.
Step* tandem_create(const Model* model, int threads) {
    Step* step = nullptr;
    guarded([&] { step = new Step(*model, threads); });
    return step;
}

void tandem_destroy(Step* step) { delete step; }

int tandem_begin(Step* step, const Batch* batch, const Pool* pool, int threads) {
    return guarded([&] { step->begin(*batch, *pool, threads); });
}

void tandem_run_layers(Step* step, int first, int last) { step->run_layers(first, last); }

void tandem_finish(Step* step, float* logits) { step->finish(logits); }

// Since the last call; see Team.
int64_t tandem_take_yields(Step* step) { return step->team().take_yields(); }
}
