// Memory that only grows, so that steps of sizes seen before allocate nothing.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

namespace tandem {

class Buffer {
   public:
    // Room for `count` values; what was there before is lost.
    template <class Value>
    Value* take(size_t count) {
        const size_t bytes = (count * sizeof(Value) + 63) / 64 * 64;
        if (bytes > bytes_) {
            memory_.reset();
            bytes_ = 0;
            memory_.reset(std::aligned_alloc(64, bytes));
            if (!memory_) throw std::bad_alloc();
            bytes_ = bytes;
        }
        return static_cast<Value*>(memory_.get());
    }

   private:
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> memory_;
    size_t bytes_ = 0;
};

}  // namespace tandem
