// Which instruction sets the CPU kernels were compiled for, and which one is in use.
#pragma once

namespace crop {

int num_builds();
const char* build_name(int build);
const char* active_isa();
int set_isa(const char* name);  // for tests; 0, or kBadArgument when not compiled or not supported by this CPU

}  // namespace crop
