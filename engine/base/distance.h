/* How far two names are from each other, to tell what a mistyped one was meant to be. */
#ifndef MLORA_BASE_DISTANCE_H
#define MLORA_BASE_DISTANCE_H

/* Bytes that are put in, left out, changed or swapped with the next, at least, to make one of the
 * other (Damerau-Levenshtein, no byte changed twice): of the first EDIT_DISTANCE_MAX bytes. */
enum { EDIT_DISTANCE_MAX = 255 };
int edit_distance(const char *a, const char *b);

#endif
