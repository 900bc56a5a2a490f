// What Python calls, through ctypes. Every call runs without Python's lock.

#include <exception>

#include "block_copy.h"
#include "draw.h"
#include "seats.h"
#include "step.h"

using tandem::Batch;
using tandem::Matrix;
using tandem::Model;
using tandem::Pool;
using tandem::Seats;
using tandem::Step;
using tandem::XxhTable;

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

int tandem_begin(Step* step, const Batch* batch, const Pool* pool) {
    return guarded([&] { step->begin(*batch, *pool); });
}

// Of those that there are: how many threads compute from now on.
void tandem_use_threads(Step* step, int threads) { step->use_threads(threads); }

void tandem_run_layers(Step* step, int first, int last) { step->run_layers(first, last); }

void tandem_finish(Step* step, float* logits) { step->finish(logits); }

// One matrix alone, on the calling thread.
int64_t tandem_row_bytes(const Matrix* matrix) { return int64_t(tandem::input_row_bytes(*matrix)); }

// x [num_rows, depth], rows [num_rows, tandem_row_bytes]
void tandem_prepare(const Matrix* matrix, const float* x, int num_rows, char* rows) {
    for (int row = 0; row < num_rows; row++)
        tandem::prepare_row(*matrix, x + size_t(row) * matrix->depth, rows + row * tandem::input_row_bytes(*matrix));
}

// out [num_rows, outputs], of which the outputs first <= o < last are written.
int tandem_multiply(const Matrix* matrix, const char* rows, int num_rows, float* out, int first, int last) {
    return guarded([&] { tandem::multiply(*matrix, rows, num_rows, out, size_t(matrix->outputs), first, last); });
}

// Fills in Phases::COUNT numbers.
void tandem_take_phases(Step* step, int64_t* nanoseconds) { step->phases().take(nanoseconds); }

// sums [count / 256, rounded up]
void tandem_weigh(const float* values, int count, float factor, float* weights, double* sums) {
    tandem::weigh_row(values, count, factor, weights, sums);
}

// Null if the memory cannot be shared.
Seats* tandem_open_seats(const char* path) {
    Seats* seats = nullptr;
    guarded([&] { seats = new Seats(path); });
    if (seats && seats->shared()) return seats;
    delete seats;
    return nullptr;
}

void tandem_close_seats(Seats* seats) { delete seats; }

int tandem_take_seat(Seats* seats) { return seats->take(); }

void tandem_leave_seat(Seats* seats, int seat) { seats->leave(seat); }

int tandem_count_others(Seats* seats, int mine) { return seats->others(mine); }

// sums[i]: the checksum of block ids[i]; a block is so many 64-bit words.
void tandem_sum_blocks(const uint64_t* pool, const int32_t* ids, int count, int64_t num_words, uint64_t* sums, const XxhTable* table) {
    for (int index = 0; index < count; index++)
        sums[index] = tandem::taken<false>(pool + ids[index] * num_words, nullptr, size_t(num_words), *table);
}

// The same of source's blocks, which are copied to the target's. Without `sums` they are only copied: what the sums cost is measured so.
void tandem_copy_blocks(const uint64_t* source, const int32_t* source_ids, uint64_t* target, const int32_t* target_ids, int count,
                        int64_t num_words, uint64_t* sums, const XxhTable* table) {
    for (int index = 0; index < count; index++) {
        const uint64_t* from = source + source_ids[index] * num_words;
        uint64_t* to = target + target_ids[index] * num_words;
        if (sums)
            sums[index] = tandem::taken<true>(from, to, size_t(num_words), *table);
        else
            std::memcpy(to, from, size_t(num_words) * 8);
    }
}
}
