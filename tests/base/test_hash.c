/* The values are those of `openssl mac SIPHASH` with the key 00 01 ... 0f. */
#include "engine/base/hash.h"

#include <criterion/criterion.h>
#include <string.h>

static const struct hash_key key = {{0x0706050403020100, 0x0f0e0d0c0b0a0908}};

Test(hash, is_siphash_with_128_bits)
{
    const unsigned char none[16] = {0xa3, 0x81, 0x7f, 0x04, 0xba, 0x25, 0xa8, 0xe6,
                                    0x6d, 0xf6, 0x72, 0x14, 0xc7, 0x55, 0x02, 0x93};
    const unsigned char nine[16] = {0x24, 0x7f, 0x7b, 0x6a, 0xdc, 0x31, 0xaa, 0x1c,
                                    0x1e, 0xc5, 0xcb, 0x10, 0x76, 0xab, 0x0b, 0xd2};

    struct hash128 hash = hash_bytes(key, "", 0);
    cr_expect_arr_eq(&hash, none, 16);
    hash = hash_bytes(key, "abcdefghi", 9);
    cr_expect_arr_eq(&hash, nine, 16);
}

Test(hash, does_not_depend_on_the_pieces)
{
    const char text[] = "How many owls live near the bridge, and how many near the mill?";
    const size_t bytes = strlen(text);
    const struct hash128 whole = hash_bytes(key, text, bytes);

    for (size_t a = 0; a <= bytes; a++)
        for (size_t b = a; b <= bytes; b += 3) {
            struct hasher hasher;
            hash_begin(&hasher, key);
            hash_add(&hasher, text, a);
            hash_add(&hasher, text + a, b - a);
            hash_add(&hasher, text + b, bytes - b);
            cr_assert(hash_equal(hash_end(&hasher), whole), "cut at %zu and %zu", a, b);
        }
    cr_expect_not(hash_equal(hash_bytes(key, text, bytes - 1), whole));
    cr_expect_not(hash_equal(hash_bytes((struct hash_key){{0, 0}}, text, bytes), whole));
}
