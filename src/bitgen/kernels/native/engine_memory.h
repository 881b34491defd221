// Memory of the engine: arrays that begin at a cache line, and the store of keys and values.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

namespace bitgen {

// What a caller can put right; its text reaches Python as an exception.
class EngineError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Numbers that begin at a multiple of 64 bytes. They are not set, and grow by being made anew.
template <typename T>
class AlignedArray {
 public:
  T* data() const { return begin_; }
  T& operator[](int64_t index) const { return begin_[index]; }
  int64_t size() const { return size_; }

  // At least `size` numbers; what was held is lost when it grows.
  T* ensure(int64_t size) {
    if (size > size_) {
      size_ = 0;
      memory_.reset();
      memory_.reset(new unsigned char[static_cast<size_t>(size) * sizeof(T) + 64]);
      const auto address = reinterpret_cast<uintptr_t>(memory_.get());
      begin_ = reinterpret_cast<T*>(memory_.get() + (64 - address % 64) % 64);
      size_ = size;
    }
    return begin_;
  }

 private:
  std::unique_ptr<unsigned char[]> memory_;
  T* begin_ = nullptr;
  int64_t size_ = 0;
};

// Keys and values of tokens, each token in a slot: [layer][key or value][head][slot][head_dim].
class KeyValueStore {
 public:
  KeyValueStore(int64_t layers, int64_t heads, int64_t head_dim)
      : layers_(layers), heads_(heads), head_dim_(head_dim) {}

  int64_t slots() const { return slots_; }

  float* keys(int64_t layer, int64_t head) const { return plane(2 * layer, head); }
  float* values(int64_t layer, int64_t head) const { return plane(2 * layer + 1, head); }

  // Room for `slots`; what is held stays.
  void grow(int64_t slots) {
    if (slots <= slots_) return;
    AlignedArray<float> larger;
    larger.ensure(2 * layers_ * heads_ * slots * head_dim_);
    for (int64_t p = 0; p < 2 * layers_ * heads_ && slots_ > 0; ++p) {
      std::memcpy(larger.data() + p * slots * head_dim_, data_.data() + p * slots_ * head_dim_,
                  static_cast<size_t>(slots_ * head_dim_) * sizeof(float));
    }
    data_ = std::move(larger);
    slots_ = slots;
  }

 private:
  float* plane(int64_t index, int64_t head) const {
    return data_.data() + (index * heads_ + head) * slots_ * head_dim_;
  }

  AlignedArray<float> data_;
  int64_t layers_, heads_, head_dim_;
  int64_t slots_ = 0;
};

}  // namespace bitgen
