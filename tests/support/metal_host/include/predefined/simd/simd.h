#include "../metal_host_predefined.h"
