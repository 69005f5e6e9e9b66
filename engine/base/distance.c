#include "engine/base/distance.h"

#include <string.h>

int edit_distance(const char *a, const char *b)
{
    int rows[3][EDIT_DISTANCE_MAX + 1]; /* of the table d[i][j], the last three of i */
    const int n_a = (int)strnlen(a, EDIT_DISTANCE_MAX), n_b = (int)strnlen(b, EDIT_DISTANCE_MAX);

    for (int j = 0; j <= n_b; j++) rows[0][j] = j;
    for (int i = 1; i <= n_a; i++) {
        int *now = rows[i % 3];
        const int *above = rows[(i + 2) % 3], *two_above = rows[(i + 1) % 3];
        now[0] = i;
        for (int j = 1; j <= n_b; j++) {
            int best = above[j - 1] + (a[i - 1] != b[j - 1]);
            if (above[j] + 1 < best) best = above[j] + 1;
            if (now[j - 1] + 1 < best) best = now[j - 1] + 1;
            const int swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
            if (swapped && two_above[j - 2] + 1 < best) best = two_above[j - 2] + 1;
            now[j] = best;
        }
    }
    return rows[n_a % 3][n_b];
}
