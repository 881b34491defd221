// What the files behind the C functions share.
#pragma once

#include <exception>
#include <new>
#include <string>

#include "engine_model.h"

struct bitgen_engine {
  bitgen::Model model;
  explicit bitgen_engine(const bitgen_engine_config& config) : model(config) {}
};

namespace bitgen {

// Of this thread.
std::string& last_error();

// What the function returns; `failed` where it throws, and last_error() says why.
template <typename Result, typename Function>
Result caught(Result failed, Function&& function) {
  try {
    return function();
  } catch (const std::bad_alloc&) {
    last_error() = "There is not enough memory.";
  } catch (const std::exception& error) {
    last_error() = error.what();
  }
  return failed;
}

}  // namespace bitgen
