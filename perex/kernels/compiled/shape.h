/* What a kernel is told of the tensors it reads; the same integers, in the same order, as in shape.py, outer.py and planes.py. */

#ifndef PEREX_SHAPE_H
#define PEREX_SHAPE_H

#include <stdint.h>

typedef int64_t size;

/* The wide tensor is what the convolution's kernel moves over, the narrow one has a value for each place it takes. */
typedef struct {
    size threads, parts;                 /* the narrow tensor's channels are shared out in so many parts */
    size batch, images, groups;          /* of examples, of images of an example, of channels */
    size rows, channels;                 /* of one group: the narrow tensor's channels, and the wide one's */
    size height, width;                  /* of the wide tensor */
    size places_y, places_x;             /* of the narrow one */
    size kernel_y, kernel_x, step_y, step_x, spread_y, spread_x, padding_y, padding_x;
    size band;                           /* how many rows of places are worked on at once */
    size wide[5], narrow[5];             /* strides in elements: example, image, channel, y, x */
} Shape;

/* Sums of outer products over positions, and which blocks of them are made: down times across. */
typedef struct {
    size threads, batch, positions, rows, columns, down, across;
    size left[2], right[2]; /* strides of examples and positions; the numbers of one lie side by side */
} Outer;

/* Images, channel by channel: the numbers of one lie side by side. */
typedef struct {
    size threads, batch, images, channels, places;
    size x[3], g[3]; /* strides of examples, images and channels */
} Planes;

#endif
