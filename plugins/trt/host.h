// The TensorRT that is loaded in this process, found without linking to it: libnvinfer,
// libtensorrt_rtx or whatever the host uses. Absent is no error.
#pragma once

#include <NvInferRuntime.h>

#if NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR < 1013
#error "the plugin library needs TensorRT 10.13 or newer"
#endif

namespace arrowhead::trt {

/// Say whether the TensorRT in this process, if any, has the interfaces this was compiled for: they
/// change with its major version. If not, nothing else here touches it, and stderr has the reason.
bool host_fits();

/// Null where no TensorRT is loaded, or another one.
nvinfer1::IPluginRegistry* host_registry();

/// What TensorRT gives a plugin library when it loads it; its logger is preferred from then on.
void set_logger_finder(nvinfer1::ILoggerFinder* finder);

using Severity = nvinfer1::ILogger::Severity;

/// Write a line to TensorRT's logger, or to stderr if there is none.
void log(Severity severity, const char* line) noexcept;

}  // namespace arrowhead::trt
