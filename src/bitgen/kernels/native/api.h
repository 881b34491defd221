// How functions get out of the library: everything else stays hidden.
#pragma once

#if defined(_WIN32)
#define BITGEN_API extern "C" __declspec(dllexport)
#else
#define BITGEN_API extern "C" __attribute__((visibility("default")))
#endif
