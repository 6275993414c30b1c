// The part of CoreFoundation that metal-cpp and this project name, for compilers
// without Apple's SDK. Declarations alone: nothing built with it is run.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef const void* CFTypeRef;
typedef const struct __CFAllocator* CFAllocatorRef;
typedef const struct __CFString* CFStringRef;
typedef const struct __CFNumber* CFNumberRef;
typedef const struct __CFDictionary* CFDictionaryRef;
typedef struct __CFDictionary* CFMutableDictionaryRef;
typedef struct CGColorSpace* CGColorSpaceRef;
typedef unsigned long CFTypeID;
typedef long CFIndex;
typedef CFIndex CFNumberType;
typedef unsigned char Boolean;
typedef double CFTimeInterval;
typedef double CGFloat;
typedef struct CGSize {
  CGFloat width, height;
} CGSize;

enum { kCFNumberIntType = 9 };

extern const CFAllocatorRef kCFAllocatorDefault;
void CFRelease(CFTypeRef object);
CFTypeID CFGetTypeID(CFTypeRef object);
CFTypeID CFNumberGetTypeID(void);
Boolean CFNumberGetValue(CFNumberRef number, CFNumberType type, void* value);

#define CFSTR(text) ((CFStringRef)__builtin___CFStringMakeConstantString("" text ""))

#ifdef __cplusplus
}
#endif
