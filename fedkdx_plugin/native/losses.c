/* The losses of FedKDX with their gradients (paper, eq. 5-8); fedkdx_plugin/algorithm/fedkdx.py says what they are. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define SIDE_BY_SIDE 32

/* log of the sum of exp(scale z) over all classes but one (-1: over all). */
static double log_sum_exp(const double *z, ptrdiff_t classes, double scale, ptrdiff_t but) {
    double most = -INFINITY, sum = 0;
    for (ptrdiff_t i = 0; i < classes; i++)
        if (i != but && !(z[i] * scale <= most)) most = z[i] * scale;
    for (ptrdiff_t i = 0; i < classes; i++)
        if (i != but) sum += exp(z[i] * scale - most);
    return most + log(sum);
}

/* One network's predictions for a window. Softened: at the temperature. Others: renormalised without the true class. */
struct predicted {
    double *log_softened, *softened, *plain, *others; /* of each class */
    double of_others;                                 /* log of what the others have together */
    double cross_entropy;
};

static struct predicted predict(const float *z, ptrdiff_t y, ptrdiff_t classes, double tau, double *room) {
    struct predicted p = {room, room + classes, room + 2 * classes, room + 3 * classes, 0, 0};
    for (ptrdiff_t i = 0; i < classes; i++) p.plain[i] = z[i]; /* logits at first */
    const double plain = log_sum_exp(p.plain, classes, 1, -1), softened = log_sum_exp(p.plain, classes, 1 / tau, -1);
    p.cross_entropy = plain - p.plain[y];
    for (ptrdiff_t i = 0; i < classes; i++) {
        p.log_softened[i] = p.plain[i] / tau - softened;
        p.softened[i] = exp(p.log_softened[i]);
        p.plain[i] = exp(p.plain[i] - plain);
    }
    p.of_others = log_sum_exp(p.log_softened, classes, 1, y);
    for (ptrdiff_t i = 0; i < classes; i++) p.others[i] = exp(p.log_softened[i] - p.of_others);
    return p;
}

/* Cross-entropy + kd KD + nkd NKD of a learner p whose target q is fixed; `by` gets the gradient by p's logits, times
   share. */
static double learn(const struct predicted *p, const struct predicted *q, ptrdiff_t y, ptrdiff_t classes, double tau,
                    double gamma, double kd, double nkd, double share, float *by) {
    double divergence = 0, others = 0;
    for (ptrdiff_t i = 0; i < classes; i++) {
        divergence += q->softened[i] * (q->log_softened[i] - p->log_softened[i]);
        const double is_true = i == y;
        double slope = p->plain[i] - is_true + kd * tau * (p->softened[i] - q->softened[i]);
        slope -= nkd * (1 - gamma) * q->softened[y] * (is_true - p->softened[i]) / tau;
        if (i != y) {
            others += q->others[i] * (p->log_softened[i] - p->of_others);
            slope += nkd * gamma * tau * (p->others[i] - q->others[i]);
        }
        by[i] = share * slope;
    }
    const double first = (1 - gamma) * q->softened[y] * p->log_softened[y];
    return p->cross_entropy + kd * tau * tau * divergence - nkd * (first + gamma * tau * tau * others);
}

/* Means over n windows of what teacher and student minimise, each learning from the other, and the gradients of each
   mean by its own logits (n, classes). y (n); values (2); room (8, classes). */
void mutual_losses(const float *teacher, const float *student, const int64_t *y, ptrdiff_t n, ptrdiff_t classes,
                   double tau, double gamma, double kd, double nkd, double *room, float *values, float *by_teacher,
                   float *by_student) {
    double of_teacher = 0, of_student = 0;
    for (ptrdiff_t w = 0; w < n; w++) {
        const ptrdiff_t at = w * classes;
        const struct predicted t = predict(teacher + at, y[w], classes, tau, room);
        const struct predicted s = predict(student + at, y[w], classes, tau, room + 4 * classes);
        of_teacher += learn(&t, &s, y[w], classes, tau, gamma, kd, nkd, 1.0 / n, by_teacher + at);
        of_student += learn(&s, &t, y[w], classes, tau, gamma, kd, nkd, 1.0 / n, by_student + at);
    }
    values[0] = of_teacher / n;
    values[1] = of_student / n;
}

static double dot(const float *a, const float *b, ptrdiff_t size) {
    float part[SIDE_BY_SIDE] = {0};
    double sum = 0;
    ptrdiff_t k = 0;
    for (; k + SIDE_BY_SIDE <= size; k += SIDE_BY_SIDE)
        for (ptrdiff_t i = 0; i < SIDE_BY_SIDE; i++) part[i] += a[k + i] * b[k + i];
    for (; k < size; k++) sum += a[k] * b[k];
    for (ptrdiff_t i = 0; i < SIDE_BY_SIDE; i++) sum += part[i];
    return sum;
}

/* h (n, size) -> rows of length 1, or of zeros where they are shorter than `shortest`. */
static void to_unit(const float *h, ptrdiff_t n, ptrdiff_t size, float shortest, float *unit, float *over_length) {
    for (ptrdiff_t w = 0; w < n; w++) {
        const float length = sqrt(dot(h + w * size, h + w * size, size));
        over_length[w] = length < shortest ? 0 : 1 / length; /* NaN stays NaN */
        for (ptrdiff_t k = 0; k < size; k++) unit[w * size + k] = h[w * size + k] * over_length[w];
    }
}

/* Gradient by rows before they were made unit, in the place of that by unit rows. */
static void back_from_unit(const float *unit, const float *over_length, ptrdiff_t n, ptrdiff_t size, float *by) {
    for (ptrdiff_t w = 0; w < n; w++) {
        const float along = dot(unit + w * size, by + w * size, size);
        for (ptrdiff_t k = 0; k < size; k++)
            by[w * size + k] = over_length[w] * (by[w * size + k] - along * unit[w * size + k]);
    }
}

/* Mean InfoNCE over the batch (eq. 7) with the teacher's features (n, size) as anchors, and its gradients by both; those
   shorter than `shortest` have no direction. room (2 n size + n n + 2 n). */
double contrastive_loss(const float *teacher, const float *student, ptrdiff_t n, ptrdiff_t size, double tau,
                        double shortest, float *room, float *by_teacher, float *by_student) {
    float *t = room, *s = t + n * size, *slope = s + n * size, *over_t = slope + n * n, *over_s = over_t + n;
    double loss = 0;
    to_unit(teacher, n, size, shortest, t, over_t);
    to_unit(student, n, size, shortest, s, over_s);
    float *turned = by_student; /* (size, n), until that is written */
    for (ptrdiff_t j = 0; j < n; j++)
        for (ptrdiff_t k = 0; k < size; k++) turned[k * n + j] = s[j * size + k];
    memset(slope, 0, n * n * sizeof *slope);
    for (ptrdiff_t i = 0; i < n; i++) {
        float *restrict own = slope + i * n; /* similarities at first */
        for (ptrdiff_t k = 0; k < size; k++)
            for (ptrdiff_t j = 0; j < n; j++) own[j] += t[i * size + k] * turned[k * n + j];
        float most = -INFINITY;
        double sum = 0;
        for (ptrdiff_t j = 0; j < n; j++)
            if (!(own[j] <= most)) most = own[j];
        const double right = (own[i] - most) / tau;
        for (ptrdiff_t j = 0; j < n; j++) sum += own[j] = expf((own[j] - most) / tau);
        loss += log(sum) - right;
        for (ptrdiff_t j = 0; j < n; j++) own[j] = (own[j] / sum - (i == j)) / (n * tau);
    }
    memset(by_teacher, 0, n * size * sizeof *by_teacher);
    memset(by_student, 0, n * size * sizeof *by_student);
    for (ptrdiff_t i = 0; i < n; i++)
        for (ptrdiff_t j = 0; j < n; j++) {
            const float by = slope[i * n + j];
            float *restrict to_t = by_teacher + i * size, *restrict to_s = by_student + j * size;
            for (ptrdiff_t k = 0; k < size; k++) {
                to_t[k] += by * s[j * size + k];
                to_s[k] += by * t[i * size + k];
            }
        }
    back_from_unit(t, over_t, n, size, by_teacher);
    back_from_unit(s, over_s, n, size, by_student);
    return loss / n;
}
