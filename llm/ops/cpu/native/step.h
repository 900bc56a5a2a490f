// A forward pass: phases that all threads share out. Between products is work by rows, at whose beginning the threads meet.
#pragma once

#include "phases.h"
#include "rows.h"
#include "team.h"
#include "workspace.h"

namespace tandem {

constexpr int TASKS_PER_THREAD = 4;
constexpr int SMALLEST_TILE_ROWS = 32;
constexpr int ROWS_FOR_ONE = 4;    // so few rows are the work of one thread between products
constexpr int LAYERS_AT_ONCE = 6;  // of steps of few rows; after each piece the team sees whether it is crowded

class Step {
   public:
    Step(const Model& model, int threads) : model_(model), team_(threads) {}

    Phases& phases() { return phases_; }

    void use_threads(int threads) { team_.use(threads); }

    // Looks up the tokens' embeddings and turns positions into angles.
    void begin(const Batch& batch, const Pool& pool) {
        batch_ = batch;
        pool_ = pool;
        plan_.make(batch, model_.kv_heads, model_.group(), team_.size());
        space_.lay_out(model_, batch, plan_, team_.size());
        phases_.begin();
        team_.run([this](int thread) {
            each_row(batch_.num_rows, thread, [this](int row) { embed(row); });
            phases_.end(thread, Phases::EMBED);
        });
    }

    // Layers first <= index < last; K and V of the batch's tokens go to the pool.
    void run_layers(int first, int last) {
        phases_.begin();
        const int at_once = batch_.num_rows <= FEW_ROWS ? LAYERS_AT_ONCE : 1;
        for (int piece = first; piece < last; piece += at_once)
            team_.run([=, this](int thread) {
                for (int index = piece; index < std::min(piece + at_once, last); index++) run_layer(index, thread);
            });
    }

    // Logits [num_logits, vocab] of the rows that they are wanted of.
    void finish(float* logits) {
        if (batch_.num_logits == 0) return;
        phases_.begin();
        team_.run([=, this](int thread) {
            each_row(batch_.num_logits, thread, [&](int row) { normalise(last_x(), row, true, model_.norm, model_.head, thread); });
            multiply_into(model_.head, batch_.num_logits, thread, logits);
            phases_.end(thread, Phases::HEAD);
        });
    }

   private:
    void run_layer(int index, int thread) {
        const Layer& layer = model_.layers[index];
        each_row(batch_.num_rows, thread, [&](int row) { normalise(space_.x, row, index > 0, layer.attention_norm, layer.qkv, thread); });
        phases_.end(thread, Phases::NORM);
        multiply_into(layer.qkv, batch_.num_rows, thread, space_.qkv);
        phases_.end(thread, Phases::QKV);
        each_row(batch_.num_rows, thread, [&](int row) { turn(row, index, layer); });
        phases_.end(thread, Phases::TURN);
        const bool last = index == model_.num_layers - 1;
        if (last && batch_.num_logits == 0) return;  // nobody needs what follows the last layer's K and V
        with_kv([=, this]<class Kv>(Kv) { attend<Kv>(index, thread); });
        phases_.end(thread, Phases::ATTENTION);
        const int rows = last ? batch_.num_logits : batch_.num_rows;
        each_row(rows, thread, [&](int row) { take_attended(row, last ? int(batch_.logits_rows[row]) : row, last, layer.output); });
        phases_.end(thread, Phases::PREPARE);
        multiply_into(layer.output, rows, thread, space_.delta);
        phases_.end(thread, Phases::OUTPUT);
        float* x = last ? last_x() : space_.x;
        each_row(rows, thread, [&](int row) { normalise(x, row, true, layer.ffn_norm, layer.gate_up, thread); });
        phases_.end(thread, Phases::NORM);
        feed_forward(layer, rows, thread);
    }

    // Rows beyond those that logits are wanted of are left out of the last layer's second half.
    float* last_x() { return batch_.num_logits == batch_.num_rows ? space_.x : space_.wanted_x; }

    void embed(int row) {
        const int size = model_.hidden, half = model_.head_dim / 2;
        const size_t place = size_t(batch_.token_ids[row]) * size;
        float* target = space_.x + size_t(row) * size;
        for (int index = 0; index < size; index++)
            target[index] = model_.embedding_format == FLOAT32 ? static_cast<const float*>(model_.embedding)[place + index]
                                                               : widen(static_cast<const uint16_t*>(model_.embedding)[place + index]);
        make_rotation(model_.frequencies, batch_.positions[row], half, space_.cosine + size_t(row) * half,
                      space_.sine + size_t(row) * half);
    }

    // Adds what the last product computed, and makes the normed row ready for the next one.
    void normalise(float* x, int row, bool has_delta, const float* weight, const Matrix& next, int thread) {
        const size_t place = size_t(row) * model_.hidden;
        if (has_delta) add(space_.delta + place, model_.hidden, x + place);
        rms_norm(x + place, weight, model_.eps, model_.hidden, space_.scratch(thread));
        prepare_row(next, space_.scratch(thread), input(next, row));
    }

    // Bias, head norms and RoPE of a row's q and k; its k and v go to the pool.
    void turn(int row, int index, const Layer& layer) {
        const int size = model_.head_dim, turned = model_.heads + model_.kv_heads;
        const size_t half = size / 2;
        float* qkv = space_.qkv + size_t(row) * model_.qkv_size();
        if (layer.qkv_bias) add(layer.qkv_bias, model_.qkv_size(), qkv);
        for (int head = 0; head < turned; head++) {
            const float* norm = head < model_.heads ? layer.query_norm : layer.key_norm;
            if (norm) rms_norm(qkv + head * size, norm, model_.eps, size, qkv + head * size);
            rotate(qkv + head * size, space_.cosine + row * half, space_.sine + row * half, size / 2);
            if (pool_.format == INT8) mix(qkv + head * size, size);
        }
        const float *keys = qkv + model_.query_size(), *values = qkv + turned * size;
        const int block = batch_.row_blocks[row], offset = batch_.row_offsets[row];
        with_kv([=, this]<class Kv>(Kv) { write_kv<Kv>(keys, values, pool_, index, block, offset); });
    }

    // Calls use(a number of the kind that the pool holds).
    template <class Use>
    void with_kv(Use use) {
        if (pool_.format == FLOAT32) return use(float());
        if (pool_.format == BFLOAT16) return use(uint16_t());
        use(int8_t());
    }

    template <class Kv>
    void attend(int index, int thread) {
        const size_t line = model_.group() * (model_.head_dim + 2);
        share(int(plan_.tasks.size()), [&](int number) {
            const DecodeTask& task = plan_.tasks[number];
            const float* query = space_.qkv + size_t(task.row) * model_.qkv_size() + task.first_head * model_.group() * model_.head_dim;
            attend_task<Kv>(task, batch_, pool_, index, query, model_.group(), space_.scratch(thread), space_.partial + task.line * line);
        });
        for (int sequence = 0; sequence < batch_.num_sequences; sequence++)
            if (batch_.rows_of(sequence) > 1) attend_chunk<Kv>(sequence, index, thread);
    }

    template <class Kv>
    void attend_chunk(int sequence, int index, int thread) {
        Chunk chunk(batch_, sequence);
        chunk.keys = space_.keys;
        chunk.values = space_.values;
        team_.meet(thread);
        share(chunk.num_gathers(pool_.kv_heads), [&](int task) { gather_strip<Kv>(chunk, batch_, pool_, index, task); });
        team_.meet(thread);
        share(chunk.num_tiles(model_.group()) * pool_.kv_heads, [&](int task) {
            attend_tile(chunk, pool_, task, model_.group(), space_.qkv, model_.qkv_size(), space_.attended, space_.scratch(thread));
        });
    }

    // Row `row` of what goes on is row `source` of the batch.
    void take_attended(int row, int source, bool last, const Matrix& next) {
        float* attended = space_.attended + size_t(source) * model_.query_size();
        if (plan_.first[source] >= 0) {
            const float* partial = space_.partial + size_t(plan_.first[source]) * model_.group() * (model_.head_dim + 2);
            combine_splits(partial, plan_.splits[source], model_.kv_heads, model_.group(), model_.head_dim, attended);
        }
        prepare_row(next, attended, input(next, row));
        if (last && last_x() != space_.x)
            std::copy_n(space_.x + size_t(source) * model_.hidden, model_.hidden, last_x() + size_t(row) * model_.hidden);
    }

    void feed_forward(const Layer& layer, int rows, int thread) {
        const int ffn = model_.ffn;
        float* up = space_.scratch(thread);
        product(ffn, rows, thread, [&](int row, int count, int first, int last) {
            const int width = last - first;
            float* gate = space_.inner + size_t(row) * ffn;
            multiply(layer.gate_up, input(layer.gate_up, row), count, gate, ffn, first, last);
            multiply(layer.gate_up, input(layer.gate_up, row), count, up - (ffn + first), width, ffn + first, ffn + last);
            for (int index = 0; index < count; index++) silu_mul(gate + size_t(index) * ffn + first, up + size_t(index) * width, width);
        });
        phases_.end(thread, Phases::GATE_UP);
        each_row(rows, thread, [&](int row) { prepare_row(layer.down, space_.inner + size_t(row) * ffn, input(layer.down, row)); });
        phases_.end(thread, Phases::PREPARE);
        multiply_into(layer.down, rows, thread, space_.delta);
        phases_.end(thread, Phases::DOWN);
    }

    void multiply_into(const Matrix& matrix, int rows, int thread, float* out) {
        product(matrix.outputs, rows, thread, [&](int row, int count, int first, int last) {
            multiply(matrix, input(matrix, row), count, out + size_t(row) * matrix.outputs, matrix.outputs, first, last);
        });
    }

    char* input(const Matrix& matrix, int row) { return space_.input + row * input_row_bytes(matrix); }

    // Calls work(first row, rows, first output, last output) for tiles that make up the whole product.
    template <class Work>
    void product(int outputs, int rows, int thread, Work work) {
        if (rows <= FEW_ROWS) {
            const int grains = (outputs + GRAIN_OUTPUTS - 1) / GRAIN_OUTPUTS, active = team_.active();
            const int first = grains * thread / active * GRAIN_OUTPUTS;
            const int last = std::min(outputs, grains * (thread + 1) / active * GRAIN_OUTPUTS);
            if (first < last) work(0, rows, first, last);
            return;
        }
        const int columns = (outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
        int tall = LARGEST_TILE_ROWS;
        while (tall > SMALLEST_TILE_ROWS && columns * tiles(rows, tall) < TASKS_PER_THREAD * team_.active()) tall /= 2;
        const int lines = tiles(rows, tall);
        share(columns * lines, [&](int task) {
            const int row = task % lines * tall, first = task / lines * TILE_OUTPUTS;
            work(row, std::min(tall, rows - row), first, std::min(outputs, first + TILE_OUTPUTS));
        });
    }

    static int tiles(int rows, int tall) { return (rows + tall - 1) / tall; }

    // Calls work(row) for each row, once all threads have come here and before any goes on.
    template <class Work>
    void each_row(int rows, int thread, Work work) {
        const auto run = [&](int first, int last) {
            for (int row = first; row < last; row++) work(row);
        };
        if (rows <= ROWS_FOR_ONE) return team_.meet(thread, [&] { run(0, rows); });
        const int at_once = rows <= FEW_ROWS ? 1 : 16;
        team_.meet(thread);
        share(tiles(rows, at_once), [&](int task) { run(task * at_once, std::min(rows, (task + 1) * at_once)); });
        team_.meet(thread);
    }

    // Calls work(task) for each task on whichever thread is free. Threads meet before the next such call.
    template <class Work>
    void share(int count, Work work) {
        for (int task = team_.take(); task < count; task = team_.take()) work(task);
    }

    const Model model_;
    Team team_;
    Phases phases_;
    Batch batch_{};
    Pool pool_{};
    DecodePlan plan_;
    Workspace space_;
};

}  // namespace tandem
