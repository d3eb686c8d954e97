// Hopper's own instructions: mbarrier, the bulk tensor copy, wgmma. Present only for sm_90a.
#pragma once
#include "types.cuh"
