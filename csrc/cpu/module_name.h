// The name of a Python module, which the build gives as LORAFAST_MODULE, and that of its function.
#pragma once

#define LORAFAST_TEXT(name) #name
#define LORAFAST_TEXT_OF(name) LORAFAST_TEXT(name)
#define LORAFAST_INIT(name) PyInit_##name
#define LORAFAST_INIT_OF(name) LORAFAST_INIT(name)
