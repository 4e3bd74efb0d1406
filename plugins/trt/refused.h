// How the library says no: as an exception inside, as a line in the log and a status outside.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>

#include "host.h"

namespace arrowhead::trt {

/// A user's input does not fit: what was wrong with what, and how to mend it.
struct Refused : std::runtime_error {
  Refused(const std::string& subject, const std::string& got, const std::string& expected,
          const std::string& fix)
      : std::runtime_error(subject + " | got " + got + "; expected " + expected + ". Fix: " + fix) {
  }
};

/// Run the body of a method that TensorRT calls. What it throws becomes a line in the log that
/// names the operator and the layer, and `failure` the result: nothing is thrown into TensorRT.
template <class Result, class Body>
Result guarded(const char* op, const std::string& layer, Result failure, Body&& body) noexcept {
  try {
    try {
      return body();
    } catch (const std::exception& error) {
      log(Severity::kERROR, (op + (" '" + layer + "': ") + error.what()).c_str());
    }
  } catch (...) {  // no memory left for the message, or no std::exception
    log(Severity::kERROR, op);
  }
  return failure;
}

}  // namespace arrowhead::trt
